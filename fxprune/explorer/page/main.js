// The page as a whole: head, plan, selection, theme and size.
let chosen = -1, paint = SCORED ? "importance" : "kind";

function tip(event, text) {
  const box = byId("tip");
  box.hidden = !event;
  if (!event) return;
  box.textContent = text;
  const left = Math.min(event.clientX + 14, window.innerWidth - box.offsetWidth - 8);
  const under = event.clientY + 18, above = event.clientY - box.offsetHeight - 12;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${under + box.offsetHeight > window.innerHeight && above > 0 ? above : under}px`;
}

function buildHead() {
  const s = DATA.summary, named = DATA.importance.name;
  byId("subtitle").textContent = [DATA.architecture, named ? `importance: ${named}` : `no importance: ${DATA.importance.why}`].filter(Boolean).join(" \u00b7 ");
  const tiles = [
    ["parameters", short(s.parameters), count(s.parameters)],
    ["in prunable groups", percent(s.parameters ? s.prunable_parameters / s.parameters : 0), count(s.prunable_parameters)],
    ["groups prunable", `${count(s.prunable_groups)} of ${count(s.groups)}`, ""],
    ["residual blocks", count(s.blocks), ""],
    ...(DATA.plan ? [["after the plan", short(DATA.plan.after), count(DATA.plan.after)]] : []),
  ];
  byId("stats").replaceChildren(...tiles.map(([name, value, full]) => el("div", { title: full || null }, el("dt", {}, name), el("dd", {}, value))));
  byId("footer").textContent = [
    named && DATA.importance.formula ? `Importance ${named}: ${DATA.importance.formula}, over what a unit owns.` : "",
    named && DATA.importance.data ? `Text: ${DATA.importance.data}.` : "",
    SCORED ? `Scores are rounded to ${DATA.digits} significant digits.` : "",
    "Shares of groups overlap: a weight has rows and columns. Tied weights count once.",
  ].filter(Boolean).join(" ");
}

function buildPlan() {
  const plan = DATA.plan;
  if (!plan) return;
  byId("plan").hidden = false;
  const saved = plan.before - plan.after;
  byId("plan-body").replaceChildren(
    el("div", { class: "whole", role: "img", "aria-label": `${percent(plan.after / plan.before)} of the parameters stay` }, el("b", { style: `width:${(100 * plan.after) / plan.before}%` })),
    el("p", {}, el("strong", {}, `${count(plan.before)} \u2192 ${count(plan.after)}`), ` parameters, ${count(saved)} saved (\u2212${percent(saved / plan.before)})`),
    ...(plan.drop.length ? [el("p", { class: "removed" }, `Dropped whole: ${plan.drop.join(", ")}`)] : []),
    ...(plan.recipe.length ? [el("details", {}, el("summary", {}, "Recipe"), el("dl", {}, ...plan.recipe.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))))] : []),
  );
}

function buildLegend() {
  const removed = DATA.plan ? el("span", {}, el("i", { class: "swatch gone" }), "removed: hollow") : "";
  const kinds = [...new Set(GROUPS.map((g) => g.kind))].map((k) => el("span", { title: `A unit is ${KINDS[k] ?? KINDS.other}` }, el("i", { class: "swatch", style: kindColour(k) }), k));
  byId("legend").replaceChildren(...(paint === "importance" ? [el("span", {}, "least", el("i", { class: "ramp" }), "most important unit of the column")] : kinds), removed);
  byId("layers-hint").textContent = paint === "importance"
    ? "A bar is a group. Its length grows with its units (as their square root), which run from the most to the least important."
    : "A bar is a group. Its length grows with its units (as their square root).";
}

function select(index) {
  chosen = index;
  for (const { group, button } of BARS) button.setAttribute("aria-pressed", String(group.index === index));
  for (const row of byId("rows").children) row.setAttribute("aria-selected", String(Number(row.dataset.group) === index));
  buildGroup(GROUPS[index]);
  try { history.replaceState(null, "", `#${encodeURIComponent(GROUPS[index].name)}`); } catch { /* a page within a page has no address */ }
}

function fromAddress() {
  return GROUPS.findIndex((g) => `#${encodeURIComponent(g.name)}` === location.hash);
}

function repaint() {
  readTheme();
  paintLayers(paint === "importance");
  if (shown) paintUnits();
}

buildHead();
buildPlan();
buildLayers();
buildTable();
buildLegend();
if (SCORED) segments(byId("paint"), "paint", [["importance", "Importance"], ["kind", "Kind"]], paint, (v) => { paint = v; buildLegend(); repaint(); });
else byId("paint").hidden = true;
readTheme();
if (GROUPS.length) {
  const at = fromAddress();
  const first = GROUPS.filter((g) => g.prunable && g.row).sort((a, b) => b.size - a.size)[0]; // the widest of the first layer
  select(at >= 0 ? at : first ? first.index : 0);
} else byId("group").hidden = true;
repaint();
byId("map").addEventListener("keydown", mapKeys);
window.addEventListener("hashchange", () => { const at = fromAddress(); if (at >= 0 && at !== chosen) select(at); });
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
let waiting = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(repaint); });
document.documentElement.dataset.ready = "yes";
