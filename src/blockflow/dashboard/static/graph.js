// Draws the layout: lines as SVG, blocks and pipelines as HTML on top of them, so that text wraps,
// grows and is read like any other. Only a change of the topology builds it anew.

import { h, setAttribute, setText, svg } from "./dom.js";
import { SIZE, layOut } from "./layout.js";

const LEAST_ZOOM = 0.88;

/** More lines than this tell nothing any more; the others are in the table. */
const MOST_LINES = 16;

export class Graph {
  #root;
  #choice;
  #filter;
  #count;
  #view = null;
  #shape = "";
  #updates = [];
  #lit = null;
  #width = 0;

  /** Draws into `root`; `choice` holds the field that says which pipelines to draw. */
  constructor(root, choice) {
    this.#root = root;
    this.#choice = choice;
    this.#filter = choice.querySelector("input");
    this.#count = choice.querySelector("output");
    this.#filter.addEventListener("input", () => this.show(this.#view));
    new ResizeObserver(() => this.#fit()).observe(root);
  }

  /** `all` is what `view.js` makes of the server's answers. */
  show(all) {
    this.#view = all;
    const view = { ...all, pipelines: this.#choose(all.pipelines) };
    const shape = JSON.stringify([
      view.pipelines.map(({ name, blocks, edges, entries, exits }) => [
        name, blocks, edges, entries, exits,
      ]),
      view.blocks.map(({ name }) => name),
    ]);
    if (shape !== this.#shape) {
      this.#shape = shape;
      this.#build(view);
    }
    const blocks = new Map(view.blocks.map((block) => [block.name, block]));
    const pipelines = new Map(view.pipelines.map((pipeline) => [pipeline.name, pipeline]));
    for (const update of this.#updates) update(blocks, pipelines);
  }

  /** What to draw: of too many pipelines those that are asked for, the broken ones first. */
  #choose(pipelines) {
    const many = pipelines.length > MOST_LINES;
    this.#choice.hidden = !many;
    if (!many) return pipelines;
    const wanted = pipelines.filter(({ name }) => name.includes(this.#filter.value));
    const broken = wanted.filter(({ ready }) => !ready).slice(0, MOST_LINES);
    const rest = wanted.filter(({ ready }) => ready).slice(0, MOST_LINES - broken.length);
    const drawn = wanted.filter((pipeline) => broken.includes(pipeline) || rest.includes(pipeline));
    const found = this.#filter.value ? `${wanted.length} found, ` : "";
    setText(this.#count, `${found}${drawn.length} of ${pipelines.length} are drawn`);
    return drawn;
  }

  #build(view) {
    const focused = this.#root.contains(document.activeElement)
      ? document.activeElement.dataset.focus
      : null;
    const layout = layOut(view.pipelines, view.blocks.map(({ name }) => name));
    const colour = new Map(view.pipelines.map(({ name, colour: kind }) => [name, kind]));
    this.#updates = [];
    const canvas = h("div", { class: "canvas" });
    canvas.style.width = `${layout.width}px`;
    canvas.style.height = `${layout.height}px`;
    canvas.append(
      drawLines(layout, colour),
      ...layout.hops.map((hop) => this.#hop(hop)),
      ...layout.sources.map((node) => this.#source(node, colour)),
      ...layout.blocks.map((node) => this.#block(node, colour)),
    );
    this.#root.replaceChildren(canvas);
    this.#width = layout.width;
    this.#fit();
    this.#light(view.pipelines.some(({ name }) => name === this.#lit) ? this.#lit : null);
    if (focused) {
      [...canvas.querySelectorAll("[data-focus]")]
        .find((element) => element.dataset.focus === focused)
        ?.focus();
    }
  }

  /** Shrink a little where that spares scrolling; text stays readable. */
  #fit() {
    const canvas = this.#root.firstElementChild;
    if (canvas === null) return;
    const fitting = this.#root.clientWidth / this.#width;
    canvas.style.zoom = fitting >= 1 ? 1 : Math.max(fitting, LEAST_ZOOM);
  }

  #source(node, colour) {
    const rate = h("span", { class: "figure" });
    const state = h("span", { class: "state" });
    const chip = h(
      "button",
      {
        class: `source ${colour.get(node.name)}`,
        "data-focus": node.id,
        "data-line": node.name,
        "aria-pressed": "false",
        click: () => this.#light(this.#lit === node.name ? null : node.name),
      },
      state,
      h("span", { class: "name", title: node.name }, node.name),
      rate,
    );
    put(chip, node);
    this.#updates.push((_, pipelines) => {
      const pipeline = pipelines.get(node.name);
      setText(rate, `${pipeline.rateText}/s`);
      setAttribute(chip, "data-state", pipeline.ready ? "ready" : "failed");
      setAttribute(
        chip,
        "aria-label",
        `Pipeline ${node.name}, ${pipeline.stateText}, through ${pipeline.blocks.join(", ")}. ` +
          "Show its line alone",
      );
      setAttribute(chip, "title", pipeline.reason ?? "");
    });
    return chip;
  }

  #block(node, colour) {
    const [state, place, figures] = ["state", "place", "figures"].map((kind) =>
      h("span", { class: kind }),
    );
    const rows = node.rows.map((name) => {
      const rate = h("span", { class: "figure" });
      const row = h(
        "span",
        { class: `row ${colour.get(name)}`, "data-line": name },
        ...(node.named ? [h("span", { class: "name" }, name), rate] : []),
      );
      this.#updates.push((blocks) => {
        if (node.named) setText(rate, blocks.get(node.name).pipelineRateText(name));
      });
      return row;
    });
    const badge = h("span", { class: "badge" });
    const card = h(
      "article",
      { class: `block ${node.named ? "" : "tight"}`, "data-block": node.name },
      h(
        "span",
        { class: "title" },
        state,
        h(
          "a",
          { class: "name", href: `#block:${node.name}`, "data-focus": node.id, title: node.name },
          node.name,
        ),
        badge,
      ),
      place,
      figures,
      h("span", { class: "rows" }, ...rows),
    );
    put(card, node);
    this.#updates.push((blocks) => {
      const block = blocks.get(node.name);
      setAttribute(card, "data-state", block.state);
      const sharing = block.members.length;
      setText(badge, sharing > 1 ? `shared by ${sharing}` : sharing ? "" : "in no pipeline");
      setText(place, block.state === "ready" ? block.placeText : block.stateText);
      setAttribute(place, "title", block.reason ?? block.placeText);
      setText(figures, `${block.rateText}/s · ${block.computeText} · queue ${block.queued}`);
    });
    return card;
  }

  #hop(hop) {
    const label = h("span", {
      class: `hop ${hop.to === null ? "last" : hop.steep ? "amid" : "above"}`,
    });
    label.style.left = `${hop.x}px`;
    label.style.top = `${hop.y}px`;
    this.#updates.push((blocks) => {
      const channel = blocks.get(hop.from).channelTo(hop.to ?? "gateway");
      setAttribute(label, "hidden", channel === null ? "" : null);
      if (channel === null) return;
      setText(label, channel.flow ? `${channel.carrier}\n${channel.flow}` : channel.carrier);
      setAttribute(label, "title", channel.text);
    });
    return label;
  }

  /** Show one pipeline's line alone, or with null all of them. */
  #light(name) {
    this.#lit = name;
    this.#root.classList.toggle("lit", name !== null);
    for (const element of this.#root.querySelectorAll("[data-line]")) {
      const on = element.dataset.line === name;
      element.classList.toggle("on", on);
      if (element.matches(".source")) element.setAttribute("aria-pressed", String(on));
    }
  }
}

function put(element, node) {
  element.style.left = `${node.x}px`;
  element.style.top = `${node.y}px`;
  element.style.width = `${node.width}px`;
  element.style.height = `${node.height}px`;
}

function drawLines(layout, colour) {
  const paths = layout.lines.map(({ name, ways, ends }) => {
    const tails = ends.map(([x, y]) => [x + SIZE.tail, y]);
    const d = [...ways.map(curve), ...tails.map(([x, y]) => `M${x - SIZE.tail},${y}H${x}`)];
    return svg(
      "g",
      { class: `line ${colour.get(name)}`, "data-line": name },
      svg("path", { d: d.join("") }),
      ...tails.map(([cx, cy]) => svg("circle", { cx, cy, r: 4.5 })),
    );
  });
  return svg(
    "svg",
    { width: layout.width, height: layout.height, "aria-hidden": "true", focusable: "false" },
    ...paths,
  );
}

function curve([first, ...rest]) {
  let path = `M${first}`;
  let [x, y] = first;
  for (const [nextX, nextY] of rest) {
    const middle = (x + nextX) / 2;
    path += y === nextY ? `H${nextX}` : `C${middle},${y} ${middle},${nextY} ${nextX},${nextY}`;
    [x, y] = [nextX, nextY];
  }
  return path;
}
