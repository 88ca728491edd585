// The page: asks the server every second, shows what it answers, and says when it does not.

import { h, setAttribute, setText } from "./dom.js";
import { Editor } from "./editor.js";
import { clock } from "./format.js";
import { Graph } from "./graph.js";
import { History } from "./history.js";
import { Meters } from "./meters.js";
import { Gone, Locked, follow, get, setToken } from "./server.js";
import { showSums, showTables } from "./tables.js";
import { changes, look, measure, verdict } from "./view.js";

const EVERY = 1000;
const EVENTS_AGAIN = 5000;
const MOST_EVENTS = 200;

const $ = (id) => document.getElementById(id);
const meters = new Meters();
const graph = new Graph($("graph"), $("graph-choice"));
const editor = new Editor(changed);
const history = new History(changed);

let last = null;
let lastHeard = null;
let timer = null;
let polling = false;

async function poll() {
  if (polling) return;
  polling = true;
  clearTimeout(timer);
  try {
    const [current, blocks, pipelines, devices] = await Promise.all(
      ["/v1/topology", "/v1/blocks", "/v1/pipelines", "/v1/devices"].map(get),
    );
    const answers = { generation: current.generation, blocks, pipelines, devices };
    measure(meters, performance.now() / 1000, answers);
    heard();
    show(look(meters, answers));
    editor.show(current);
    await history.show(current.generation);
  } catch (error) {
    report(error);
  } finally {
    polling = false;
    // A page that nobody sees asks for nothing.
    if (!document.hidden) timer = setTimeout(poll, EVERY);
  }
}

function show(view) {
  const [state, text] = verdict(view);
  setAttribute($("verdict"), "data-state", state);
  setText($("verdict"), text);
  setText($("generation"), String(view.generation));
  document.title = `${text} · BlockFlow`;
  const nothing = view.blocks.length === 0;
  $("nothing").hidden = !nothing;
  $("graph").hidden = nothing;
  $("graph-hint").hidden = nothing;
  if (!nothing) graph.show(view);
  showSums(view);
  showTables(view);
  if (last !== null) announce(changes(last, view));
  last = view;
}

function heard() {
  if (lastHeard === null || !$("trouble").hidden) announce(lastHeard ? ["The server is back."] : []);
  lastHeard = new Date();
  $("trouble").hidden = true;
  $("token-form").hidden = true;
  document.body.classList.remove("stale");
}

function report(error) {
  if (error instanceof Locked) {
    if ($("token-form").hidden) {
      $("token-form").hidden = false;
      $("token").focus();
    }
    setVerdict("waiting", "locked");
    return;
  }
  if (!(error instanceof Gone)) {
    // A mistake of this page: it must not look like the server's.
    console.error(error);
    complain(`This page cannot show what the server answered: ${error.message}`);
    return;
  }
  const since = lastHeard === null ? "" : ` What you see is from ${clock(lastHeard)}.`;
  complain(`The server at ${location.host} does not answer.${since} Trying again every second.`);
  setVerdict("failed", "server gone");
  document.body.classList.add("stale");
}

function setVerdict(state, text) {
  setAttribute($("verdict"), "data-state", state);
  setText($("verdict"), text);
  document.title = `${text} · BlockFlow`;
}

function complain(text) {
  setText($("trouble"), text);
  $("trouble").hidden = false;
}

/** After a change was answered, or was not. */
function changed(error) {
  if (error) report(error);
  else poll();
}

// Events: the server's own where it has them, or else what this page has seen change.

let serverEvents = false;

function announce(sentences) {
  if (sentences.length === 0) return;
  setText($("announcer"), sentences.join(" "));
  if (!serverEvents) for (const sentence of sentences) addEvent(new Date(), sentence, "");
}

function addEvent(time, text, kind) {
  const stamp = h("time", { datetime: time.toISOString() }, clock(time));
  $("events").prepend(h("li", { "data-kind": kind }, stamp, " ", text));
  while ($("events").children.length > MOST_EVENTS) $("events").lastElementChild.remove();
}

async function followEvents() {
  let first = true;
  try {
    const known = await follow("/v1/events", (message) => {
      // Every stream begins with what the server remembers. It might be another server by now.
      if (first) {
        first = false;
        serverEvents = true;
        $("events").replaceChildren();
        setText($("events-hint"), "What the server has written down, the newest first.");
      }
      const event = JSON.parse(message.data);
      const words = event.kind.replaceAll("_", " ");
      const reason = event.reason ? `: ${event.reason}` : "";
      addEvent(new Date(event.at * 1000), `${words} (${event.subject})${reason}`, event.kind);
      if (event.kind.startsWith("generation_")) history.outdated();
      poll();
    });
    if (!known) return;
  } catch (error) {
    // That the server is gone, or locked, is said by the poll.
    if (!(error instanceof Gone || error instanceof Locked)) console.error(error);
  }
  setTimeout(followEvents, EVENTS_AGAIN);
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken($("token").value);
  $("token").value = "";
  poll();
});
document.addEventListener("visibilitychange", () => document.hidden || poll());

poll();
followEvents();
