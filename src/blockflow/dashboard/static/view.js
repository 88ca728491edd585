// What the page shows, made of the server's answers: names to figures, figures to text. Pure.

import { NONE, bytes, grouped, milliseconds, plural, rate } from "./format.js";

/** So many lines can be told apart; `style.css` names them. */
const COLOURS = 8;

/** Read counters of one round of answers into `meters`. `time` is in seconds. */
export function measure(meters, time, { pipelines, blocks, devices }) {
  for (const pipeline of pipelines) {
    meters.add(`pipeline ${pipeline.name}`, time, pipeline.requests);
    meters.add(`errors ${pipeline.name}`, time, pipeline.errors);
    if (pipeline.latency) meters.addHistogram(`latency ${pipeline.name}`, time, pipeline.latency);
  }
  for (const block of serving(blocks)) {
    const key = `block ${block.name}`;
    meters.add(key, time, block.requests);
    for (const [name, count] of Object.entries(block.requests_by_pipeline)) {
      meters.add(`${key} ${name}`, time, count);
    }
    if (block.batch_sizes) {
      const times = total(block.batch_sizes.counts);
      meters.add(`${key} times`, time, times);
      meters.add(`${key} batched`, time, block.batch_sizes.sum);
      meters.add(`${key} compute`, time, times * (block.compute_ms_mean ?? 0));
    }
    for (const [peer, channel] of channels(block)) {
      meters.add(`${key} > ${peer}`, time, channel.bytes);
    }
  }
  for (const device of devices.devices) {
    if (device.energy_joules !== null) {
      meters.add(`energy ${device.name}`, time, device.energy_joules);
    }
  }
  meters.forget(time);
}

/** Everything the page shows, in its words. */
export function look(meters, { generation, pipelines, blocks, devices }) {
  const members = new Map(blocks.map(({ name }) => [name, []]));
  for (const { name, blocks: chain } of pipelines) {
    for (const block of new Set(chain)) members.get(block)?.push(name);
  }
  const current = serving(blocks);
  return {
    generation,
    pipelines: pipelines.map((pipeline, i) => ({
      ...lookAtPipeline(meters, pipeline),
      colour: `line-${i % COLOURS}`,
    })),
    blocks: current.map((block) => lookAtBlock(meters, block, members.get(block.name))),
    // In an update a block exists twice for a while. The tables show both.
    leaving: blocks
      .filter((block) => !current.includes(block))
      .map((block) => lookAtBlock(null, block, [])),
    workers: workers(blocks),
    devices: devices.devices.map((device) => lookAtDevice(meters, device)),
    deviceProblem: devices.problem,
    sums: sums(meters, pipelines, current, devices.devices),
  };
}

/** One of each block: the first one that is listed is the one that serves. */
function serving(blocks) {
  const first = new Map();
  for (const block of blocks) if (!first.has(block.name)) first.set(block.name, block);
  return [...first.values()];
}

function lookAtPipeline(meters, pipeline) {
  const latency = (q) =>
    pipeline.latency
      ? meters.quantile(`latency ${pipeline.name}`, pipeline.latency, q)
      : null;
  const kinds = Object.entries(pipeline.errors_by_kind);
  const errors = kinds.map(([kind, count]) => `${grouped(count)} ${kind}`).join(", ");
  return {
    ...pipeline,
    rateText: rate(meters.rate(`pipeline ${pipeline.name}`)),
    trail: meters.trail(`pipeline ${pipeline.name}`),
    stateText: pipeline.ready ? "ready" : `not ready: ${pipeline.reason ?? "no reason given"}`,
    p50Text: milliseconds(toMilliseconds(latency(0.5))),
    p99Text: milliseconds(toMilliseconds(latency(0.99))),
    errorsText: errors || (pipeline.errors ? grouped(pipeline.errors) : "none"),
  };
}

function toMilliseconds(seconds) {
  return seconds === null ? null : seconds * 1000;
}

function lookAtBlock(meters, block, members) {
  const key = `block ${block.name}`;
  const times = meters?.growth(`${key} times`) ?? 0;
  const compute = times ? meters.growth(`${key} compute`) / times : block.compute_ms_mean;
  const all = block.batch_sizes ? total(block.batch_sizes.counts) : 0;
  const batch = times
    ? meters.growth(`${key} batched`) / times
    : all
      ? block.batch_sizes.sum / all
      : null;
  const sends = channels(block);
  const state = block.state.replaceAll("_", " ");
  return {
    ...block,
    members,
    rateText: meters ? rate(meters.rate(key)) : NONE,
    pipelineRateText: (name) => `${rate(meters.rate(`${key} ${name}`) ?? 0)}/s`,
    computeText: milliseconds(compute),
    batchText: batch === null ? NONE : batch.toFixed(1),
    stateText: block.reason ? `${state}: ${block.reason}` : state,
    placeText:
      block.worker === block.name ? block.device : `${block.device} · worker ${block.worker}`,
    channelTo: (peer) => (sends.has(peer) ? channelText(meters, key, peer, sends.get(peer)) : null),
    sendsText: [...sends].map(([peer, { carrier }]) => `${peer} (${carrier})`).join(", ") || NONE,
  };
}

/** What a block sends to each of its peers; connections of one kind are one. */
function channels(block) {
  const found = new Map();
  for (const { peer, carrier, bytes: count, host_bytes: host } of block.channels) {
    const sum = found.get(peer) ?? { carriers: new Set(), bytes: 0, host: 0 };
    sum.carriers.add(carrier);
    sum.bytes += count;
    sum.host += host;
    found.set(peer, sum);
  }
  for (const sum of found.values()) sum.carrier = [...sum.carriers].join(", ");
  return found;
}

function channelText(meters, key, peer, channel) {
  const perSecond = meters?.rate(`${key} > ${peer}`) ?? 0;
  return {
    carrier: channel.carrier,
    flow: perSecond ? `${bytes(perSecond)}/s` : "",
    text:
      `${channel.carrier}: ${bytes(channel.bytes)} handed over, ` +
      `${bytes(channel.host)} of them through host memory`,
  };
}

function workers(blocks) {
  const found = new Map();
  for (const block of blocks) {
    const key = `${block.worker} ${block.pid}`;
    const worker = found.get(key) ?? { key, name: block.worker, pid: block.pid, blocks: 0 };
    worker.blocks += 1;
    worker.host = block.host_memory_bytes;
    worker.device = block.device_memory_bytes ?? worker.device ?? null;
    found.set(key, worker);
  }
  return [...found.values()].map((worker) => ({
    ...worker,
    pidText: worker.pid === null ? "not running" : String(worker.pid),
    hostText: bytes(worker.host),
    deviceText: bytes(worker.device),
  }));
}

function lookAtDevice(meters, device) {
  const used = device.memory_total - device.memory_available;
  const { utilization, power_watts: power, temperature_celsius: heat } = device;
  return {
    ...device,
    used,
    memoryText: `${bytes(used)} of ${bytes(device.memory_total)}`,
    busyText: utilization === null ? NONE : `${(100 * utilization).toFixed(0)} %`,
    powerText: power === null ? NONE : `${power.toFixed(0)} W`,
    heatText: heat === null ? NONE : `${heat.toFixed(0)} °C`,
  };
}

function sums(meters, pipelines, blocks, devices) {
  const ready = pipelines.filter((pipeline) => pipeline.ready).length;
  const perSecond = (kind) => {
    const rates = pipelines.map(({ name }) => meters.rate(`${kind} ${name}`) ?? 0);
    return rates.reduce((a, b) => a + b, 0);
  };
  const power = devices.filter((device) => device.power_watts !== null);
  const processes = new Map(blocks.map((block) => [block.pid, block.host_memory_bytes ?? 0]));
  const found = [
    ["Pipelines ready", `${ready} of ${pipelines.length}`],
    ["Requests", `${rate(perSecond("pipeline"))}/s`],
    ["Failures", `${rate(perSecond("errors"))}/s`],
    ["Workers' memory", bytes(total([...processes.values()]))],
  ];
  if (power.length) {
    const energy = total(power.map(({ name }) => meters.growth(`energy ${name}`)));
    const served = total(pipelines.map(({ name }) => meters.growth(`pipeline ${name}`)));
    found.push(["GPU power", `${total(power.map((device) => device.power_watts)).toFixed(0)} W`]);
    found.push(["Energy per request", served ? `${(energy / served).toPrecision(3)} J` : NONE]);
  }
  return found;
}

/** What is different between two rounds, as sentences. */
export function changes(before, now) {
  const said = [];
  if (before.generation !== now.generation) said.push(`Generation ${now.generation} serves.`);
  const old = new Map(before.pipelines.map((pipeline) => [pipeline.name, pipeline]));
  for (const pipeline of now.pipelines) {
    const was = old.get(pipeline.name);
    if (was && was.ready !== pipeline.ready) {
      said.push(`Pipeline ${pipeline.name} is ${pipeline.stateText}.`);
    }
  }
  const states = new Map(before.blocks.map((block) => [block.name, block]));
  for (const block of now.blocks) {
    const was = states.get(block.name);
    if (was && was.state !== block.state) said.push(`Block ${block.name} is ${block.stateText}.`);
  }
  return said;
}

/** The one line at the top: `[state, text]`. */
export function verdict(view) {
  if (view.pipelines.length === 0) return ["empty", "nothing deployed"];
  const missing = view.pipelines.filter((pipeline) => !pipeline.ready).length;
  return missing
    ? ["failed", `${plural(missing, "pipeline")} not ready`]
    : ["ready", "everything ready"];
}

function total(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}
