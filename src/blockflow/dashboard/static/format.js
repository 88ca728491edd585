// Numbers and topologies as people read them. Pure.

export const NONE = "–";

export function rate(perSecond) {
  if (perSecond === null) return NONE;
  if (perSecond === 0) return "0";
  return perSecond < 10 ? perSecond.toFixed(1) : grouped(perSecond);
}

export function milliseconds(value) {
  if (value === null) return NONE;
  if (value >= 10000) return `${(value / 1000).toFixed(1)} s`;
  return `${value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)} ms`;
}

export function bytes(count) {
  if (count === null || count === undefined) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit += 1) count /= 1024;
  return `${unit === 0 || count >= 100 ? count.toFixed(0) : count.toFixed(1)} ${units[unit]}`;
}

export function grouped(value) {
  return Math.round(value).toLocaleString("en");
}

export function plural(count, one) {
  return `${count} ${one}${count === 1 ? "" : "s"}`;
}

export function clock(time) {
  return time.toLocaleTimeString([], { hour12: false });
}

/** A topology as YAML, in the form that people write it in; null settings are left out. */
export function toYaml(topology) {
  return lines(topology, "").join("\n") + "\n";
}

function lines(value, indent) {
  const found = [];
  for (const [key, item] of Object.entries(value)) {
    if (item === null) continue;
    const name = `${indent}${scalar(key)}:`;
    if (Array.isArray(item) && item.every((each) => typeof each !== "object")) {
      found.push(`${name} [${item.map(scalar).join(", ")}]`);
    } else if (Array.isArray(item)) {
      found.push(`${name} ${JSON.stringify(item)}`); // JSON is YAML
    } else if (typeof item === "object") {
      const inner = lines(item, `${indent}  `);
      found.push(...(inner.length ? [name, ...inner] : [`${name} {}`]));
    } else {
      found.push(`${name} ${scalar(item)}`);
    }
  }
  return found;
}

// YAML 1.1 reads many plain words as something else (`no`, `1e3`, `12:30`): only words that start
// with a letter or a slash, and are no keyword, go without quotes.
const PLAIN = /^[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9]+)*$/;
const KEYWORD = /^(y|n|yes|no|true|false|on|off|null)$/i;

function scalar(value) {
  if (typeof value !== "string") return JSON.stringify(value);
  return PLAIN.test(value) && !KEYWORD.test(value) ? value : JSON.stringify(value);
}
