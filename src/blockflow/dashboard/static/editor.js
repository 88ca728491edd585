// The topology as text: look at it, check it, apply it.

import { h, setText } from "./dom.js";
import { plural, toYaml } from "./format.js";
import { change } from "./server.js";

const $ = (id) => document.getElementById(id);

export class Editor {
  #text = $("text");
  #outcome = $("outcome");
  #serving = null;
  #base = null;
  #loaded = "";
  #busy = false;
  #onChange;

  /** `onChange` is called with errors of the connection, and with null after a change. */
  constructor(onChange) {
    this.#onChange = onChange;
    this.#text.addEventListener("input", () => this.#explain());
    this.#text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.#send(false);
      }
    });
    $("check").addEventListener("click", () => this.#send(true));
    $("load").addEventListener("click", () => this.#load());
    $("editor").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(false);
    });
  }

  /** What serves now. Text that nobody has touched follows it. */
  show(current) {
    const moved = this.#serving?.generation !== current.generation;
    this.#serving = current;
    if (moved && this.#text.value === this.#loaded && !this.#busy) this.#load();
    this.#explain();
  }

  #load() {
    if (this.#serving === null) return;
    const { topology, generation } = this.#serving;
    const empty = !Object.keys(topology.blocks).length && !Object.keys(topology.pipelines).length;
    this.#loaded = empty ? "" : toYaml(topology);
    this.#text.value = this.#loaded;
    this.#base = generation;
    this.#explain();
  }

  get #overtaken() {
    return this.#serving !== null && this.#base !== null && this.#base !== this.#serving.generation;
  }

  #explain() {
    const now = this.#serving?.generation;
    const touched = this.#text.value !== this.#loaded;
    const hint = this.#overtaken
      ? `Your text began as generation ${this.#base}, and generation ${now} serves now. ` +
        "Applying it takes back what was changed in between."
      : touched
        ? `Changed since generation ${now}; nothing is applied yet.`
        : this.#text.value
          ? `This is generation ${now}, which serves.`
          : "An empty topology, {}, removes everything. Ctrl+Enter applies.";
    setText($("text-hint"), hint);
    setText($("apply"), this.#overtaken ? `Apply over generation ${now}` : "Apply");
  }

  async #send(dryRun) {
    if (this.#busy) return;
    const text = this.#text.value;
    this.#work(true, dryRun ? "Checking…" : "Applying: new blocks are started before old ones end…");
    try {
      const path = `/v1/topology${dryRun ? "?dry_run=true" : ""}`;
      const headers = { "Content-Type": typeOf(text) };
      // Whoever else changes the topology while this is read and decided on is not overruled.
      if (this.#serving !== null) headers["If-Match"] = `"${this.#serving.generation}"`;
      const answer = await change("PUT", path, text, headers);
      this.#tell(answer, dryRun);
      if (answer.ok && !dryRun) {
        this.#loaded = text;
        this.#base = answer.body.generation;
      }
      this.#onChange(null);
    } catch (error) {
      this.#outcome.replaceChildren(
        note("bad", "No answer came: whether it was applied will show above."),
      );
      this.#onChange(error);
    } finally {
      this.#work(false);
    }
  }

  #work(busy, text) {
    this.#busy = busy;
    // Not `disabled`: that would take the focus away from whoever pressed the button by key.
    for (const id of ["check", "apply", "load"]) {
      $(id).setAttribute("aria-disabled", String(busy));
    }
    if (busy) this.#outcome.replaceChildren(note("busy", text));
  }

  #tell({ ok, body }, dryRun) {
    if (!ok) {
      this.#outcome.replaceChildren(...refusal(body));
      return;
    }
    const head = dryRun
      ? "It can be deployed. It would"
      : `Generation ${body.generation} serves. It did`;
    this.#outcome.replaceChildren(note("good", `${head}:`), actionList(body));
  }
}

/** JSON is YAML too, but read as what it is it gets the better messages, and is read faster. */
function typeOf(text) {
  try {
    JSON.parse(text);
    return "application/json";
  } catch {
    return "application/yaml";
  }
}

/** What a refused change was answered with, every problem in a line. */
export function refusal(body) {
  const problems = body.problems ?? [];
  if (problems.length === 0) return [note("bad", body.error)];
  return [
    note("bad", `It has ${plural(problems.length, "problem")}, and nothing was changed:`),
    h("ul", {}, problems.map((problem) => h("li", {}, problem))),
  ];
}

/** What an update does, in words. */
export function actionList({ keep, start, stop, actions }) {
  const named = (verb, names) => (names.length ? [`${verb} ${names.join(", ")}`] : []);
  const workers = [...named("start workers", start), ...named("stop workers", stop)];
  const found = [...(actions.length ? actions : workers), ...named("leave alone", keep)];
  return h("ul", {}, (found.length ? found : ["change nothing"]).map((line) => h("li", {}, line)));
}

export function note(kind, text) {
  return h("p", { class: `note ${kind}` }, text);
}
