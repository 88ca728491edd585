// The tables: the same facts as the graph, in rows.

import { cells, fillTable, h, setAttribute, setText, svg } from "./dom.js";

const $ = (id) => document.getElementById(id);

export function showSums(view) {
  const list = $("sums");
  view.sums.forEach(([name, text], i) => {
    if (!list.children[i]) list.append(h("div", {}, h("dt"), h("dd")));
    const [term, value] = list.children[i].children;
    setText(term, name);
    setText(value, text);
  });
  while (list.children.length > view.sums.length) list.lastElementChild.remove();
}

export function showTables(view) {
  fillTable($("pipelines"), view.pipelines, ({ name }) => name, (row, { name }) => {
    row.id = `pipeline:${name}`;
    return cells(row, [
      ["name", swatched],
      ["", stateOf(({ ready }) => (ready ? "ready" : "failed"))],
      ["chain", ({ path }) => path],
      ["number", ({ rateText }) => rateText],
      ["", spark],
      ["number", ({ p50Text }) => p50Text],
      ["number", ({ p99Text }) => p99Text],
      ["number", ({ requests }) => requests.toLocaleString("en")],
      ["", ({ errorsText }) => errorsText],
    ]);
  });

  const blocks = [
    ...view.blocks.map((block) => ({ ...block, key: block.name })),
    ...view.leaving.map((block) => ({ ...block, key: `${block.name} ${block.pid}` })),
  ];
  fillTable($("blocks"), blocks, ({ key }) => key, (row, { key }) => {
    row.id = `block:${key}`;
    return cells(row, [
      ["name", ({ name }) => name],
      ["", stateOf(({ state }) => state)],
      ["", ({ members }) => members.join(", ") || "none"],
      ["", ({ device }) => device],
      ["", ({ worker }) => worker],
      ["number", ({ rateText }) => rateText],
      ["number", ({ computeText }) => computeText],
      ["number", ({ batchText }) => batchText],
      ["number", ({ queued }) => String(queued)],
      ["", ({ sendsText }) => sendsText],
    ]);
  });

  fillTable($("workers"), view.workers, ({ key }) => key, (row) =>
    cells(row, [
      ["name", ({ name }) => name],
      ["", ({ pidText }) => pidText],
      ["number", (worker) => String(worker.blocks)],
      ["number", ({ hostText }) => hostText],
      ["number", ({ deviceText }) => deviceText],
    ]),
  );

  fillTable($("devices"), view.devices, ({ name }) => name, (row) =>
    cells(row, [
      ["name", described],
      ["", memory],
      ["number", ({ busyText }) => busyText],
      ["number", ({ powerText }) => powerText],
      ["number", ({ heatText }) => heatText],
    ]),
  );
  const problem = $("device-problem");
  problem.hidden = view.deviceProblem === null;
  setText(problem, view.deviceProblem ?? "");
}

function swatched({ name, colour }, cell) {
  if (!cell.firstChild) cell.append(h("span"), name);
  setAttribute(cell.firstChild, "class", `swatch ${colour}`);
}

function described({ name, model }, cell) {
  if (!cell.firstChild) cell.append(name, h("small"));
  setText(cell.lastChild, model);
}

function stateOf(state) {
  return (item, cell) => {
    if (!cell.firstChild) cell.append(h("span", { class: "state" }), h("span"));
    setAttribute(cell, "data-state", state(item));
    setText(cell.lastChild, item.stateText);
  };
}

function memory({ name, used, memory_total: size, memoryText }, cell) {
  if (!cell.firstChild) {
    cell.append(h("meter", { min: 0, max: 1, "aria-label": `Memory of ${name}` }), h("span"));
  }
  cell.firstChild.value = used / size;
  setText(cell.lastChild, memoryText);
}

const WIDTH = 96;
const HEIGHT = 20;
const SECONDS = 60;

function spark({ trail, rateText, name }, cell) {
  if (!cell.firstChild) {
    const path = svg("path");
    cell.append(svg("svg", { class: "spark", width: WIDTH, height: HEIGHT, role: "img" }, path));
  }
  const most = Math.max(1, ...trail.map(([, rate]) => rate));
  const points = trail.map(
    ([ago, rate]) =>
      `${(WIDTH * (1 - ago / SECONDS)).toFixed(1)},${(HEIGHT - 1 - (HEIGHT - 3) * (rate / most)).toFixed(1)}`,
  );
  setAttribute(cell.firstChild.firstChild, "d", points.length > 1 ? `M${points.join("L")}` : "");
  const text = `${name}: now ${rateText} requests a second, at most ${most.toFixed(0)}`;
  setAttribute(cell.firstChild, "aria-label", text);
}
