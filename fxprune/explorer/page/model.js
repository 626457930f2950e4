// The data of the page, decoded once.
const DATA = JSON.parse(document.getElementById("data").textContent);

const KINDS = {
  kv_heads: "a key-value head with all of its query heads",
  query_groups: "one query head of every key-value head",
  head_dim: "one dimension of every head",
  ffn: "an intermediate channel of a feed-forward block",
  experts: "an expert of a mixture, with its row of the router",
  hidden: "a dimension of the residual stream, everywhere",
  channels: "a channel of convolutions",
  other: "an entry of a dimension without a role of its own",
};

const GROUPS = DATA.groups.map((g, index) => ({ ...g, index, keep: g.kept ? bits(g.kept, g.size) : null }));
const ROWS = new Map(DATA.rows.map((r) => [r.name, r]));
const SCORED = GROUPS.some((g) => g.scores);

for (const g of GROUPS) {
  const dropped = ROWS.get(g.row)?.dropped;
  if (dropped) g.keep = new Uint8Array(g.size);
  g.keptCount = g.keep ? g.keep.reduce((a, b) => a + b, 0) : g.size;
  if (!g.scores) continue;
  const worth = (unit) => g.scores[unit] ?? -Infinity;
  g.order = Array.from(g.scores.keys()).sort((a, b) => worth(b) - worth(a) || a - b);
  g.rank = new Uint32Array(g.size);
  g.order.forEach((unit, place) => { g.rank[unit] = place + 1; });
  const known = g.scores.filter((s) => s !== null);
  g.mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

function bits(text, size) {
  const bytes = atob(text);
  return Uint8Array.from({ length: size }, (_, i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1);
}

function sizeOf(tree) {
  const [sort, ...rest] = tree;
  if (sort === "x") return rest.reduce((n, t) => n * sizeOf(t), 1);
  if (sort === "+") return rest.reduce((n, t) => n + sizeOf(t), 0);
  return rest[0];
}

// Positions along a dimension that a unit owns: Uint8Array of 0 and 1.
function owned(tree, unit) {
  const [sort, ...rest] = tree;
  if (sort === "own") return Uint8Array.from({ length: rest[0] }, (_, i) => Number(i === unit));
  if (sort === "axis") return new Uint8Array(rest[0]);
  const parts = rest.map((t) => owned(t, unit));
  if (sort === "+") {
    const all = new Uint8Array(parts.reduce((n, p) => n + p.length, 0));
    let at = 0;
    for (const part of parts) { all.set(part, at); at += part.length; }
    return all;
  }
  return parts.reduce((outer, inner) => {
    const both = new Uint8Array(outer.length * inner.length);
    for (let i = 0; i < outer.length; i++) for (let j = 0; j < inner.length; j++) both[i * inner.length + j] = outer[i] | inner[j];
    return both;
  }, new Uint8Array(1));
}

function positions(group, member, unit) {
  const found = [];
  owned(DATA.layouts[member[2]], unit).forEach((yes, i) => { if (yes) found.push(i); });
  return found;
}

// "0-63, 192-255", at most `most` runs of them.
function ranges(numbers, most = 6) {
  const runs = [];
  for (const n of numbers) {
    const last = runs.at(-1);
    if (last && n === last[1] + 1) last[1] = n; else runs.push([n, n]);
  }
  const text = runs.slice(0, most).map(([a, b]) => (a === b ? `${a}` : `${a}\u2013${b}`)).join(", ");
  return runs.length > most ? `${text}, \u2026 (${count(numbers.length)} in all)` : text;
}

function count(n) { return n.toLocaleString("en-US", { maximumFractionDigits: 1 }); }
function short(n) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["k", 1e3]]) if (n >= size) return `${(n / size).toFixed(n < 10 * size ? 2 : 1)} ${unit}`;
  return `${n}`;
}
function percent(x, digits = 1) { return `${(100 * x).toFixed(digits)} %`; }
function number(x) { return x === null || x === undefined ? "\u2013" : x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(2) : `${+x.toPrecision(3)}`; }
function layerOf(group) { return group.row ? Number(group.row.split(".").at(-1)) : null; }
function verdict(g) { return g.prunable ? (g.normalised ? "yes, under a norm" : "yes") : `no: ${g.reasons[0]}`; }

function el(tag, facts = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(facts)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") made.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

function byId(id) { return document.getElementById(id); }

const ODD = (kind) => !(kind in KINDS);
function kindColour(kind) { return `--kind: var(--kind-${ODD(kind) ? "other" : kind})`; }
