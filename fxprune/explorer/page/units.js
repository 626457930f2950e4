// The units of the selected group: a heat map or bars, one of them looked at.
const VIEW = { form: "heat", sorted: false };
let shown = null; // { group, finder, unit }

function segments(parent, name, choices, value, change) {
  parent.append(...choices.map(([key, text]) => el("label", {}, el("input", { type: "radio", name, value: key, checked: key === value, onchange: () => change(key) }), text)));
  return parent;
}

function buildUnits(group) {
  shown = { group, finder: null, unit: shown?.group === group ? shown.unit : group.order ? group.order[0] : 0 };
  const set = (key, value) => { VIEW[key] = value; paintUnits(); };
  const canvas = el("canvas", {
    id: "canvas", tabindex: "0", role: "slider", "aria-label": `Units of ${group.name}`, "aria-valuemin": "0", "aria-valuemax": String(group.size - 1),
    onpointermove: (e) => over(e), onpointerleave: () => tip(null), onclick: (e) => { const unit = unitAt(e); if (unit !== null) look(unit); }, onkeydown: unitKeys,
  });
  byId("units").replaceChildren(
    el(
      "div", { class: "tools" }, el("h3", {}, group.scores ? "Importance of each unit" : "Units"),
      group.scores ? segments(el("fieldset", { class: "segments" }, el("legend", { class: "unseen" }, "Picture")), "form", [["heat", "Heat map"], ["bars", "Bars"]], VIEW.form, (v) => set("form", v)) : null,
      group.scores ? segments(el("fieldset", { class: "segments" }, el("legend", { class: "unseen" }, "Order")), "order", [["number", "By number"], ["rank", "By rank"]], VIEW.sorted ? "rank" : "number", (v) => set("sorted", v === "rank")) : null,
    ),
    canvas,
    el("div", { id: "scale", class: "hint" }),
    el("div", { id: "readout", class: "readout", "aria-live": "polite" }),
  );
  paintUnits();
}

function paintUnits() {
  const { group } = shown, canvas = byId("canvas");
  const width = Math.max(120, byId("units").clientWidth), order = VIEW.sorted && group.order ? group.order : null;
  const scale = group.scores ? scaleOf([group]) : null;
  const draw = group.scores ? (VIEW.form === "bars" ? drawBars : drawHeat) : group.size > 4096 ? drawLine : drawHeat;
  shown.finder = draw(canvas, group, { width, order, scale, selected: shown.unit });
  const colours = scale && draw === drawHeat ? `Colour from ${number(scale.low)} to ${number(scale.high)}${scale.outer ? " (all but the outer hundredths)" : ""}` : scale ? "The height of a bar is the score" : DATA.importance.why ? `No importance: ${DATA.importance.why}` : "No importance for this group";
  const removed = group.keptCount < group.size ? (draw === drawHeat ? "; struck through: removed" : "; marked below: removed") : "";
  byId("scale").textContent = `${colours}${scale?.log ? ", logarithmic" : ""}${removed}. Click or use the arrow keys to look at a unit.`;
  readOut();
}

function unitText(group, unit) {
  const parts = [`unit ${unit}`];
  if (group.scores) parts.push(`score ${number(group.scores[unit])}`, `rank ${count(group.rank[unit])} of ${count(group.size)}`);
  if (DATA.plan && group.prunable) parts.push(keeps(group, unit) ? "kept" : "removed");
  return parts;
}

function keeps(group, unit) { return !group.keep || group.keep[unit] === 1; }

function readOut() {
  const { group, unit } = shown, [name, ...facts] = unitText(group, unit);
  const canvas = byId("canvas");
  canvas.setAttribute("aria-valuenow", unit);
  canvas.setAttribute("aria-valuetext", [name, ...facts].join(", "));
  byId("readout").replaceChildren(el("strong", {}, name[0].toUpperCase() + name.slice(1)), ...facts.map((f) => el("span", { class: f === "kept" || f === "removed" ? f : null }, f)));
  showOwned(group, unit);
}

function look(unit) {
  shown.unit = unit;
  paintUnits();
}

function unitAt(event) {
  const box = byId("canvas").getBoundingClientRect();
  const place = shown.finder.find(event.clientX - box.left, event.clientY - box.top);
  return place === null ? null : VIEW.sorted && shown.group.order ? shown.group.order[place] : place;
}

function over(event) {
  const unit = unitAt(event), { group } = shown;
  if (unit === null) return tip(null);
  const members = group.members.slice(0, 4).map((m) => `${DATA.parameters[m[0]][0]} [dim ${m[1]}]: ${ranges(positions(group, m, unit), 3)}`);
  const more = group.members.length > 4 ? [`and ${group.members.length - 4} more`] : [];
  tip(event, [unitText(group, unit).join(", "), ...members, ...more].join("\n"));
}

function unitKeys(event) {
  const { group, unit, finder } = shown, order = VIEW.sorted && group.order ? group.order : null;
  const place = order ? order.indexOf(unit) : unit, row = finder.across ?? 10;
  const to = { ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - row, ArrowDown: place + row, Home: 0, End: group.size - 1, PageUp: place - 10 * row, PageDown: place + 10 * row }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = Math.max(0, Math.min(group.size - 1, to));
  look(order ? order[next] : next);
}
