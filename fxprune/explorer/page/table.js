// All groups as a table that sorts and filters.
const COLUMNS = [
  { key: "name", text: "group", value: (g) => g.name },
  { key: "kind", text: "kind", value: (g) => g.kind },
  { key: "layer", text: "layer", num: true, value: layerOf, show: (g) => (g.row ? String(layerOf(g)) : "\u2013") },
  { key: "units", text: "units", num: true, value: (g) => g.size, show: (g) => count(g.size) },
  ...(DATA.plan ? [{ key: "kept", text: "kept", num: true, value: (g) => g.keptCount / g.size, show: (g) => (g.keptCount < g.size ? `${count(g.keptCount)} (${percent(g.keptCount / g.size, 0)})` : "all") }] : []),
  { key: "per", text: "parameters a unit", num: true, value: (g) => g.perUnit, show: (g) => count(g.perUnit) },
  { key: "share", text: "share of the model", num: true, value: (g) => g.size * g.perUnit, show: (g) => percent(Math.min(1, (g.size * g.perUnit) / DATA.summary.parameters)) },
  ...(SCORED ? [{ key: "mean", text: "mean score", num: true, value: (g) => g.mean ?? null, show: (g) => number(g.mean) }] : []),
  { key: "prunable", text: "prunable", value: verdict, show: verdict },
];
const SORT = { key: null, down: false };

function buildTable() {
  const kinds = [...new Set(GROUPS.map((g) => g.kind))];
  byId("filters").replaceChildren(
    el("label", {}, "Name", el("input", { type: "search", id: "find", placeholder: "mlp, layers.3, embed\u2026", oninput: fillTable })),
    el("label", {}, "Kind", el("select", { id: "kind", onchange: fillTable }, el("option", { value: "" }, "all"), ...kinds.map((k) => el("option", { value: k }, k)))),
    el("label", {}, "Show", el("select", { id: "state", onchange: fillTable }, ...[["", "all"], ["prunable", "prunable"], ["pinned", "pinned"], ...(DATA.plan ? [["pruned", "pruned by the plan"]] : [])].map(([v, t]) => el("option", { value: v }, t)))),
  );
  byId("filters").addEventListener("submit", (e) => e.preventDefault());
  byId("table").replaceChildren(el(
    "table", { class: "list" }, el("caption", { class: "unseen" }, "Prune groups"),
    el("thead", {}, el("tr", {}, ...COLUMNS.map((c) => el("th", { scope: "col", class: c.num ? "num" : null, "data-key": c.key, "aria-sort": "none" }, el("button", { type: "button", onclick: () => sortBy(c.key) }, c.text))))),
    el("tbody", { id: "rows" }),
  ));
  fillTable();
}

function sortBy(key) {
  SORT.down = SORT.key === key ? !SORT.down : false;
  SORT.key = key;
  for (const th of byId("table").querySelectorAll("th")) th.setAttribute("aria-sort", th.dataset.key === key ? (SORT.down ? "descending" : "ascending") : "none");
  fillTable();
}

function fillTable() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean), kind = byId("kind").value, state = byId("state").value;
  const fits = (g) => words.every((w) => `${g.name} ${g.reasons.join(" ")}`.toLowerCase().includes(w)) && (!kind || g.kind === kind)
    && (!state || (state === "prunable" ? g.prunable : state === "pinned" ? !g.prunable : g.keptCount < g.size));
  const rows = GROUPS.filter(fits), column = COLUMNS.find((c) => c.key === SORT.key);
  if (column) {
    const compare = (a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index; // what is unknown stands last
      const way = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return (SORT.down ? -way : way) || a.index - b.index;
    };
    rows.sort(compare);
  }
  byId("rows").replaceChildren(...rows.map((g) => el(
    "tr", { "data-group": g.index, "aria-selected": String(g.index === chosen) },
    ...COLUMNS.map((c) => (c.key === "name"
      ? el("td", {}, el("button", { type: "button", class: "path", onclick: () => { select(g.index); byId("group").scrollIntoView({ block: "nearest" }); } }, g.name))
      : el("td", { class: c.num ? "num" : null }, ...(c.key === "kind" ? [el("span", { class: "chip" }, el("i", { class: "swatch", style: kindColour(g.kind) }), g.kind)] : [(c.show ?? c.value)(g)])))),
  )));
  byId("count").textContent = `${count(rows.length)} of ${count(GROUPS.length)} groups`;
}
