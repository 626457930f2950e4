// The map: layers down, kinds across, and above it the groups that lie in no single layer.
const BARS = []; // { group, canvas, room, column }: drawn again when the theme or the width changes

function columnsOf() {
  const columns = new Map();
  for (const g of GROUPS) if (g.row) {
    if (!columns.has(g.column)) columns.set(g.column, { name: g.column, kind: g.kind, groups: [], most: 0 });
    const column = columns.get(g.column);
    column.groups.push(g);
    column.most = Math.max(column.most, g.size);
  }
  return [...columns.values()];
}

function told(g) {
  const lines = [g.name, `${g.kind}: ${count(g.size)} units of ${count(g.perUnit)} parameters`];
  if (g.keptCount < g.size) lines.push(`${count(g.keptCount)} kept, ${count(g.size - g.keptCount)} removed`);
  if (g.scores) lines.push(`scores ${number(g.scores[g.order.at(-1)])} to ${number(g.scores[g.order[0]])}, mean ${number(g.mean)}`);
  if (!g.prunable) lines.push(`pinned: ${g.reasons[0]}`);
  return lines.join("\n");
}

function barOf(g, column) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const text = g.keptCount < g.size ? `${count(g.keptCount)}/${count(g.size)}` : count(g.size);
  const button = el(
    "button",
    {
      type: "button", class: "bar", "data-group": g.index, "aria-pressed": "false", "aria-label": told(g).replaceAll("\n", "; "),
      onclick: () => select(g.index), onpointermove: (e) => tip(e, told(g)), onpointerleave: () => tip(null),
    },
    canvas, el("span", { class: "n" }, text), g.prunable ? null : el("span", { class: "pin" }, "pinned"),
  );
  BARS.push({ group: g, canvas, button, column });
  return button;
}

function buildLayers() {
  const columns = columnsOf();
  const apart = GROUPS.filter((g) => !g.row);
  const widest = Math.max(1, ...apart.map((g) => g.size));
  byId("spanning").replaceChildren(
    ...apart.map((g) => el(
      "div", { class: "wide" },
      el("span", { class: "chip", title: g.name }, el("i", { class: "swatch", style: kindColour(g.kind) }), el("span", { class: "path" }, g.name)),
      barOf(g, { groups: apart.filter((o) => o.kind === g.kind), most: widest, root: true }),
    )),
  );
  byId("map").replaceChildren(...(columns.length ? [mapTable(columns)] : []));
}

function mapTable(columns) {
  const stacks = new Map();
  for (const row of DATA.rows) {
    const stack = row.name.split(".").slice(0, -1).join(".");
    if (!stacks.has(stack)) stacks.set(stack, []);
    stacks.get(stack).push(row);
  }
  const most = Math.max(...DATA.rows.map((r) => r.parameters[0]), 1);
  const head = el(
    "tr", {}, el("th", { scope: "col" }, "layer"),
    ...columns.map((c) => el("th", { scope: "col" }, el("span", { class: "path", title: c.name }, c.name.split(".").slice(0, -1).join(".") || "\u00a0"),
      el("span", { class: "chip" }, el("i", { class: "swatch", style: kindColour(c.kind) }), c.kind))),
    el("th", { scope: "col" }, el("span", { class: "path" }, "parameters"), el("span", {}, DATA.plan ? "kept of all" : "in the layer")),
  );
  const bodies = [...stacks].map(([stack, rows]) => el(
    "tbody", {},
    ...(stacks.size > 1 ? [el("tr", { class: "stack" }, el("th", { colspan: columns.length + 2, scope: "rowgroup" }, el("span", { class: "path" }, stack)))] : []),
    ...rows.map((row) => el(
      "tr", { class: row.dropped ? "dropped" : null, "data-row": row.name },
      el("th", { scope: "row", title: row.dropped ? `${row.name}: dropped whole` : row.name }, row.name.split(".").at(-1)),
      ...columns.map((c) => el("td", {}, ...c.groups.filter((g) => g.row === row.name).map((g) => barOf(g, c)))),
      el("td", {}, amount(row, most)),
    )),
  ));
  return el("table", {}, el("caption", { class: "unseen" }, "Layers down, prune groups across; each cell opens its group"), el("thead", {}, head), ...bodies);
}

function amount(row, most) {
  const [before, after] = row.parameters;
  const wide = Math.round((40 * before) / most);
  return el(
    "span", { class: "amount", title: `${count(after)} of ${count(before)} parameters` },
    el("i", { style: `width:${wide}px` }, el("b", { style: `width:${(100 * after) / (before || 1)}%` })),
    short(after), after < before ? el("span", { class: "less" }, `\u2212${percent(1 - after / before, 0)}`) : null,
  );
}

function paintLayers(importance) {
  const scales = new Map(BARS.map(({ column }) => [column, null]));
  for (const column of scales.keys()) if (importance) scales.set(column, scaleOf(column.groups));
  const columns = [...scales.keys()].filter((column) => !column.root), widest = Math.max(...columns.map((c) => c.most));
  const roomOf = (column) => 34 + 96 * Math.sqrt(column.most / widest);
  const draw = (share) => {
    for (const { group, canvas, column, button } of BARS) {
      const room = column.root ? Math.max(60, Math.min(360, button.clientWidth - 120)) : share * roomOf(column);
      drawStrip(canvas, group, Math.max(6, Math.round(room * Math.sqrt(group.size / column.most))), scales.get(column));
    }
  };
  const map = byId("map");
  for (let share = 10; share >= 5; share--) { // bars shrink, down to half, before the table scrolls
    draw(share / 10);
    if (map.scrollWidth <= map.clientWidth) break;
  }
}

// Arrow keys go from cell to cell.
function mapKeys(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const cell = event.target.closest("td");
  if (!step || !cell) return;
  const rows = [...byId("map").querySelectorAll("tr[data-row]")], row = rows.indexOf(cell.parentElement);
  const next = rows[row + step[0]]?.cells[cell.cellIndex + step[1]]?.querySelector("button");
  if (next) { event.preventDefault(); next.focus(); }
}
