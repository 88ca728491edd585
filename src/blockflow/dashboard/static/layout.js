// Where blocks and lines lie in the graph: layers from left to right, few crossings. Pure.
//
// Layered drawing after Sugiyama: blocks get layers by their longest way from a source, lines that
// pass a layer get a place of their own in it, the order within layers is improved by barycentres,
// and heights are the least-squares fit to straight lines that keeps order and distance.

export const SIZE = {
  source: { width: 148, height: 40 },
  block: { width: 196, head: 66, row: 24, tightRow: 6, foot: 10 },
  gapX: 76,
  gapY: 20,
  passing: 7,
  margin: 10,
  tail: 26,
};

/** Lines that rise or fall more than this, in pixels, have their label amid them. */
const STEEP = 16;

/** More lines than this through one block are drawn without their names. */
const NAMED_ROWS = 8;

/**
 * Lay out `pipelines` (`{name, blocks, edges, entries, exits}`) over `blocks` (names).
 *
 * Gives `{width, height, sources, blocks, lines, hops}`; a block has its `rows`, the pipelines
 * through it from top to bottom; a line its `ways`, each the points from one block to the next, and
 * the `ends` where it leaves the last ones; a hop, which is a pair of blocks of which the first
 * feeds the second, the place of its label.
 */
export function layOut(pipelines, blocks) {
  const graph = buildGraph(pipelines, blocks);
  order(graph);
  place(graph);
  return describe(graph, pipelines);
}

/** Nodes by layers, and the ways between them: `{line, nodes}`, one node in each layer. */
function buildGraph(pipelines, blocks) {
  const nodes = new Map();
  const depth = depths(pipelines);
  for (const { name } of pipelines) {
    nodes.set(`>${name}`, { id: `>${name}`, kind: "source", name, layer: 0, lines: [name] });
  }
  for (const name of blocks) {
    nodes.set(name, { id: name, kind: "block", name, layer: depth.get(name) ?? 1, lines: [] });
  }
  const ways = [];
  for (const { name, blocks: members, edges, entries } of pipelines) {
    for (const block of members) if (nodes.has(block)) addLine(nodes.get(block), name);
    for (const [from, to] of [...entries.map((block) => [`>${name}`, block]), ...edges]) {
      const [first, last] = [nodes.get(from), nodes.get(to)];
      if (first === undefined || last === undefined) continue;
      const way = [first];
      for (let layer = first.layer + 1; layer < last.layer; layer += 1) {
        const id = `${from}|${to}|${layer}`; // no name has a bar in it
        if (!nodes.has(id)) nodes.set(id, { id, kind: "passing", name, layer, lines: [] });
        addLine(nodes.get(id), name);
        way.push(nodes.get(id));
      }
      ways.push({ line: name, nodes: [...way, last] });
    }
  }
  const layers = [];
  for (const node of nodes.values()) (layers[node.layer] ??= []).push(node);
  for (let i = 0; i < layers.length; i += 1) layers[i] ??= [];
  return { nodes, ways, layers };
}

function addLine(node, pipeline) {
  if (!node.lines.includes(pipeline)) node.lines.push(pipeline);
}

/** The longest way to each block. Ways that lead back are left out, so that this always ends. */
function depths(pipelines) {
  const after = new Map();
  for (const { blocks, edges } of pipelines) {
    for (const block of blocks) if (!after.has(block)) after.set(block, new Set());
    for (const [from, to] of edges) after.get(from).add(to);
  }
  const sorted = [];
  const state = new Map();
  const visit = (block) => {
    state.set(block, "open");
    for (const next of after.get(block)) {
      if (!state.has(next)) visit(next);
      else if (state.get(next) === "open") after.get(block).delete(next);
    }
    state.set(block, "done");
    sorted.unshift(block);
  };
  for (const block of after.keys()) if (!state.has(block)) visit(block);
  const depth = new Map(sorted.map((block) => [block, 1]));
  for (const block of sorted) {
    for (const next of after.get(block)) {
      depth.set(next, Math.max(depth.get(next), depth.get(block) + 1));
    }
  }
  return depth;
}

function order({ layers, ways }) {
  const before = new Map();
  const after = new Map();
  for (const [from, to] of steps(ways)) {
    push(before, to, from);
    push(after, from, to);
  }
  const number = (layer) => layer.forEach((node, i) => (node.place = i));
  layers.forEach(number);
  const sweep = (layer, neighbours) => {
    for (const node of layer) {
      const near = neighbours.get(node) ?? [];
      node.wish = near.length ? mean(near.map((other) => other.place)) : node.place;
    }
    layer.sort((a, b) => a.wish - b.wish || a.place - b.place);
    number(layer);
  };
  let best = null;
  for (let round = 0; round < 8; round += 1) {
    const crossed = crossings(layers, after);
    if (best === null || crossed < best.crossed) {
      best = { crossed, layers: layers.map((layer) => [...layer]) };
    }
    if (crossed === 0) break;
    layers.slice(1).forEach((layer) => sweep(layer, before));
    layers.slice(0, -1).reverse().forEach((layer) => sweep(layer, after));
  }
  best.layers.forEach((layer, i) => {
    layers[i] = layer;
    number(layer);
  });
  // Lines that part are in the order in which they part, and in the same order in every block:
  // so those that run beside each other do not cross.
  const courses = new Map(layers[0].map(({ name }) => [name, course(ways, name)]));
  layers[0].sort((a, b) => compareCourses(courses.get(a.name), courses.get(b.name)));
  number(layers[0]);
  const rank = new Map(layers[0].filter((n) => n.kind === "source").map((n, i) => [n.name, i]));
  for (const node of layers.flat()) node.lines.sort((a, b) => rank.get(a) - rank.get(b));
}

/** Where a line passes each layer after the first: the mean of its places there. */
function course(ways, line) {
  const places = [];
  for (const way of ways) {
    if (way.line !== line) continue;
    for (const node of way.nodes.slice(1)) (places[node.layer - 1] ??= new Set()).add(node.place);
  }
  return Array.from(places, (each) => mean([...(each ?? [0])]));
}

function compareCourses(one, other) {
  for (let i = 0; i < Math.min(one.length, other.length); i += 1) {
    if (one[i] !== other[i]) return one[i] - other[i];
  }
  return one.length - other.length;
}

/** Each pair of nodes that lie next to each other on a way, with its line. */
function steps(ways) {
  return ways.flatMap(({ line, nodes }) =>
    nodes.slice(1).map((node, i) => [nodes[i], node, line]),
  );
}

function crossings(layers, after) {
  let count = 0;
  for (const layer of layers) {
    const ends = layer.flatMap((node) =>
      (after.get(node) ?? []).map((next) => [node.place, next.place]),
    );
    for (let i = 0; i < ends.length; i += 1) {
      for (let j = i + 1; j < ends.length; j += 1) {
        if ((ends[i][0] - ends[j][0]) * (ends[i][1] - ends[j][1]) < 0) count += 1;
      }
    }
  }
  return count;
}

function place({ layers, ways }) {
  let x = SIZE.margin;
  for (const layer of layers) {
    const width = Math.max(0, ...layer.map(widthOf));
    for (const node of layer) {
      node.x = x;
      node.width = node.kind === "passing" ? width : widthOf(node);
      node.height = heightOf(node);
    }
    if (layer.length) x += width + SIZE.gapX;
  }
  for (const layer of layers) fit(layer, layer.map(() => [0]));
  const near = new Map();
  for (const [from, to, line] of steps(ways)) {
    const shift = lineY(to, line) - lineY(from, line);
    push(near, from, () => to.y + shift);
    push(near, to, () => from.y - shift);
  }
  // To and fro, each layer to where its neighbours lie by now: so what a crowded layer needs
  // reaches the others in a few rounds.
  const sweep = [...layers, ...[...layers].reverse()];
  const rounds = Math.max(6, Math.min(40, Math.round(4000 / layers.flat().length)));
  for (let round = 0; round < rounds; round += 1) {
    for (const layer of sweep) {
      fit(layer, layer.map((node) => near.get(node)?.map((at) => at()) ?? [node.y]));
    }
  }
  const top = Math.min(...layers.flat().map((node) => node.y));
  for (const node of layers.flat()) node.y = Math.round(node.y - top + SIZE.margin);
}

/**
 * Set `y` of a layer's nodes as near to their `wishes` as their order and their distances allow.
 * Every wish counts the same, and not every node: or else no round would be the last one.
 */
function fit(layer, wishes) {
  // Without the room that the nodes above take, "in order and apart" is just "not falling", and the
  // nearest such sequence is found by pooling neighbours that are the wrong way round.
  let room = 0;
  const rooms = layer.map((node) => {
    const mine = room;
    room += node.height + SIZE.gapY;
    return mine;
  });
  const pools = [];
  layer.forEach((node, i) => {
    let pool = { wishes: wishes[i].map((wish) => wish - rooms[i]), members: [i] };
    while (pools.length && mean(pools.at(-1).wishes) > mean(pool.wishes)) {
      const last = pools.pop();
      pool = {
        wishes: [...last.wishes, ...pool.wishes],
        members: [...last.members, ...pool.members],
      };
    }
    pools.push(pool);
  });
  for (const { wishes: all, members } of pools) {
    for (const i of members) layer[i].y = mean(all) + rooms[i];
  }
}

function widthOf(node) {
  return node.kind === "passing" ? 0 : SIZE[node.kind].width;
}

function heightOf(node) {
  switch (node.kind) {
    case "source":
      return SIZE.source.height;
    case "passing":
      return Math.max(1, node.lines.length) * SIZE.passing;
    default:
      return SIZE.block.head + Math.max(1, node.lines.length) * rowOf(node) + SIZE.block.foot;
  }
}

function rowOf(node) {
  return node.lines.length > NAMED_ROWS ? SIZE.block.tightRow : SIZE.block.row;
}

/** How far below a node's top a line passes it. */
function lineY(node, line) {
  const row = node.lines.indexOf(line);
  switch (node.kind) {
    case "source":
      return SIZE.source.height / 2;
    case "passing":
      return (row + 0.5) * SIZE.passing;
    default:
      return SIZE.block.head + (row + 1) * rowOf(node) - 2;
  }
}

function describe({ nodes, ways, layers }, pipelines) {
  const all = [...nodes.values()];
  const left = (node, line) => [node.x, node.y + lineY(node, line)];
  const right = (node, line) => [node.x + node.width, node.y + lineY(node, line)];
  const lines = pipelines.map(({ name, exits }) => ({
    name,
    ways: ways
      .filter(({ line }) => line === name)
      .map(({ nodes: way }) => [
        right(way[0], name),
        ...way.slice(1, -1).flatMap((node) => [left(node, name), right(node, name)]),
        left(way.at(-1), name),
      ]),
    ends: exits.filter((block) => nodes.has(block)).map((block) => right(nodes.get(block), name)),
  }));
  const hops = new Map();
  const addHop = (from, to, x, y, rise) => {
    const key = `${from.id}|${to?.id}`;
    const hop = hops.get(key) ?? { from: from.name, to: to?.name ?? null, ys: [], steep: false };
    hop.x = x;
    hop.ys.push(y + rise / 2); // a curve is half-way there in the middle
    hop.steep ||= Math.abs(rise) > STEEP;
    hops.set(key, hop);
  };
  for (const { line, nodes: way } of ways) {
    if (way[0].kind !== "block") continue;
    const [x, y] = right(way[0], line);
    addHop(way[0], way.at(-1), x + SIZE.gapX / 2, y, left(way[1], line)[1] - y);
  }
  for (const { name, exits, edges } of pipelines) {
    for (const block of exits) {
      // Where the line goes on as well there is no room for one more label.
      if (!nodes.has(block) || edges.some(([from]) => from === block)) continue;
      const [x, y] = right(nodes.get(block), name);
      addHop(nodes.get(block), null, x + SIZE.tail + 10, y, 0);
    }
  }
  return {
    width: Math.max(...all.map((node) => node.x + node.width)) + SIZE.tail + 68,
    height: Math.max(...all.map((node) => node.y + node.height)) + SIZE.margin,
    sources: layers[0].filter((node) => node.kind === "source"),
    blocks: layers
      .flat()
      .filter((node) => node.kind === "block")
      .map((node) => ({ ...node, rows: node.lines, named: node.lines.length <= NAMED_ROWS })),
    lines,
    // The label of flat lines stands on them, that of steep ones amid them.
    hops: [...hops.values()].map(({ ys, ...hop }) => ({
      ...hop,
      y: hop.steep || hop.to === null ? mean(ys) : Math.min(...ys),
    })),
  };
}

function push(map, key, value) {
  if (!map.has(key)) map.set(key, []);
  map.get(key).push(value);
}

function mean(values) {
  return values.reduce((a, b) => a + b, 0) / values.length;
}
