// Building and refreshing the document. Strings of the server become text, never markup.

/** An element with `properties` (`class`, `data-*`, `aria-*` and the like) and children. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Change text only where it differs: selections stay, and screen readers are not disturbed. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** The same for an attribute; null removes it. */
export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/**
 * Make the rows of a table's body those of `items`. `make(item)` builds the cells of a new row and
 * gives a function that fills them in; rows are told apart by `key(item)`.
 */
export function fillTable(table, items, key, make) {
  const body = table.tBodies[0];
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  items.forEach((item, i) => {
    let row = old.get(key(item));
    old.delete(key(item));
    if (row === undefined) {
      row = h("tr", { "data-key": key(item) });
      row.refresh = make(row, item);
    }
    if (body.rows[i] !== row) body.insertBefore(row, body.rows[i] ?? null);
    row.refresh(item);
  });
  for (const row of old.values()) row.remove();
}

/** Cells of a row, each filled in by a function of `(cell, item)`; the first one is its header. */
export function cells(row, columns) {
  const made = columns.map(([kind, fill], i) => {
    const cell = h(i === 0 ? "th" : "td", {
      class: kind || null,
      scope: i === 0 ? "row" : null,
    });
    row.append(cell);
    return [cell, fill];
  });
  return (item) => made.forEach(([cell, fill]) => {
    const text = fill(item, cell);
    if (typeof text === "string") setText(cell, text);
  });
}
