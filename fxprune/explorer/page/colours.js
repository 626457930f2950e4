// Colours of the theme in force, for canvases.
let theme = null;

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  const kinds = Object.fromEntries(Object.keys(KINDS).map((k) => [k, get(`--kind-${k}`)]));
  const stops = [0, 1, 2, 3].map((i) => rgb(get(`--ramp-${i}`)));
  const ramp = Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (stops.length - 1), at = Math.min(Math.floor(x), stops.length - 2), t = x - at;
    return `rgb(${stops[at].map((c, j) => Math.round(c + t * (stops[at + 1][j] - c))).join(" ")})`;
  });
  theme = { kinds, ramp, gone: get("--gone"), ink: get("--ink"), soft: get("--soft"), line: get("--line"), track: get("--track"), card: get("--card"), kept: get("--ramp-2"), focus: get("--focus") };
}

function rgb(hex) { return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)); }
function kindInk(kind) { return theme.kinds[kind] ?? theme.kinds.other; }
function rampAt(t) { return theme.ramp[Math.max(0, Math.min(255, Math.round(255 * t)))]; }

// A scale from scores to 0..1: logarithmic where none is negative and they span more than a factor of ten, else linear. For colours it
// is clipped to the range of all but the outer hundredths, so that one large score does not make the others look alike.
function scaleOf(groups, clipped = true) {
  const known = Float64Array.from(groups.flatMap((g) => (g.scores ?? []).filter((s) => s !== null))).sort();
  const outer = clipped && known.length >= 50 ? Math.floor(known.length / 100) : 0;
  const low = known[outer] ?? 0, high = known[known.length - 1 - outer] ?? 0;
  const least = known.find((s) => s > 0 && s >= low) ?? high;
  const log = (known[0] ?? 0) >= 0 && least < high && high / least > 10;
  const bottom = log ? Math.log(least) : low, span = (log ? Math.log(high) : high) - bottom;
  const at = (s) => (s === null ? 0 : span > 0 ? Math.max(0, Math.min(1, ((log ? Math.log(Math.max(s, least)) : s) - bottom) / span)) : 0.5);
  return { low, high, least, log, at, outer };
}
