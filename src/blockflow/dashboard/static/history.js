// The generations that were, and the way back to one of them.

import { cells, fillTable, h, setAttribute, setText } from "./dom.js";
import { actionList, note, refusal } from "./editor.js";
import { plural } from "./format.js";
import { change, get } from "./server.js";

const $ = (id) => document.getElementById(id);
const PATH = "/v1/topology/history";

export class History {
  #serving = null;
  #chosen = null;
  #read = null;
  #busy = false;
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    $("confirm-no").addEventListener("click", () => $("confirm").close());
    $("confirm-yes").addEventListener("click", () => this.#rollBack());
    $("confirm").addEventListener("cancel", (event) => this.#busy && event.preventDefault());
  }

  /** Something was tried that may not have become the generation that serves. */
  outdated() {
    this.#read = null;
  }

  /** Read the history again when another generation serves than before, or it is outdated. */
  async show(generation) {
    this.#serving = generation;
    if (this.#read === generation) return;
    const records = await get(PATH);
    $("history-section").hidden = records === null;
    this.#read = generation;
    if (records === null) return;
    fillTable($("history"), records, (record) => String(record.generation), (row) =>
      cells(row, [
        ["name", (record) => String(record.generation)],
        ["when", ({ at }) => new Date(at * 1000).toLocaleString([], SHORT)],
        ["", (record, cell) => this.#what(record, cell)],
        ["act", (record, cell) => this.#action(record, cell)],
      ]),
    );
  }

  #what({ verb, outcome, reason, topology }, cell) {
    const count = (of) => Object.keys(of).length;
    const blocks = plural(count(topology.blocks), "block");
    const size = `${blocks}, ${plural(count(topology.pipelines), "pipeline")}`;
    setAttribute(cell, "data-state", outcome === "failed" ? "failed" : "past");
    return outcome === "failed" ? `${verb} failed: ${reason}` : `${verb}: ${size}`;
  }

  #action(record, cell) {
    const kind = record.generation === this.#serving ? "serves" : record.outcome;
    if (cell.dataset.kind === kind) return;
    cell.dataset.kind = kind;
    cell.replaceChildren(
      kind === "serves"
        ? h("b", {}, "serves now")
        : kind === "failed"
          ? ""
          : h(
              "button",
              {
                type: "button",
                "aria-label": `Roll back to generation ${record.generation}`,
                click: () => this.#ask(record),
              },
              "Roll back…",
            ),
    );
  }

  async #ask({ generation }) {
    this.#chosen = generation;
    setText($("confirm-heading"), `Roll back to generation ${generation}?`);
    $("confirm-text").replaceChildren(note("busy", "Looking at what that changes…"));
    $("confirm-yes").hidden = true;
    $("confirm").showModal();
    try {
      const { ok, body } = await this.#post(true);
      if (this.#chosen !== generation) return;
      $("confirm-text").replaceChildren(
        ...(ok ? [note("good", "It would:"), actionList(body)] : refusal(body)),
      );
      $("confirm-yes").hidden = !ok;
      if (ok) $("confirm-yes").focus();
    } catch (error) {
      $("confirm").close();
      this.#onChange(error);
    }
  }

  async #rollBack() {
    if (this.#busy) return;
    this.#busy = true;
    $("confirm-text").replaceChildren(note("busy", "Rolling back…"));
    try {
      const { ok, body } = await this.#post(false);
      if (ok) {
        $("confirm").close();
      } else {
        $("confirm-text").replaceChildren(...refusal(body));
        $("confirm-yes").hidden = true;
      }
      this.#onChange(null);
    } catch (error) {
      $("confirm").close();
      this.#onChange(error);
    } finally {
      this.#busy = false;
    }
  }

  #post(dryRun) {
    const body = JSON.stringify({ generation: this.#chosen });
    const path = `/v1/topology/rollback${dryRun ? "?dry_run=true" : ""}`;
    return change("POST", path, body, { "Content-Type": "application/json" });
  }
}

const SHORT = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hour12: false };
