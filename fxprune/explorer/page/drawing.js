// What is drawn on canvases; sizes in CSS pixels.
function surface(canvas, width, height) {
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * dense));
  canvas.height = Math.max(1, Math.round(height * dense));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(dense, dense);
  return pen;
}

// A group as a strip: its length is its width, units from the most to the least important, removed ones hollow.
function drawStrip(canvas, group, width, scale) {
  const height = 14, pen = surface(canvas, width, height);
  const share = group.keptCount / group.size;
  let hollow = Math.floor(width * share);
  if (!scale || !group.scores) {
    pen.fillStyle = kindInk(group.kind);
    pen.fillRect(0, 0, width * share, height);
  } else {
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x / width) * group.size), to = Math.max(from + 1, Math.floor(((x + 1) / width) * group.size));
      let sum = 0, kept = 0;
      for (let i = from; i < to; i++) { sum += scale.at(group.scores[group.order[i]]); kept += group.keep ? group.keep[group.order[i]] : 1; }
      pen.fillStyle = rampAt(sum / (to - from));
      if (kept < to - from) hollow = Math.min(hollow, x);
      const tall = height * (kept / (to - from));
      pen.fillRect(x, height - tall, 1, tall);
    }
  }
  if (share < 1) {
    pen.strokeStyle = theme.gone;
    pen.strokeRect(hollow + 0.5, 0.5, width - hollow - 1, height - 1);
  }
}

// Units as squares, row by row. Returns how to find them again.
function drawHeat(canvas, group, { width, order, scale, selected }) {
  const n = group.size;
  const side = Math.max(3, Math.min(30, Math.floor(Math.sqrt((width * 170) / n))));
  const across = Math.max(1, Math.min(n, Math.floor(width / side))), down = Math.ceil(n / across), gap = side > 6 ? 1 : 0;
  const pen = surface(canvas, width, down * side);
  const xy = (i) => [(i % across) * side, Math.floor(i / across) * side];
  for (let i = 0; i < n; i++) {
    const unit = order ? order[i] : i, [x, y] = xy(i), room = side - gap;
    if (group.keep && !group.keep[unit]) {
      pen.fillStyle = theme.track;
      pen.fillRect(x, y, room, room);
      pen.strokeStyle = theme.gone;
      pen.beginPath();
      pen.moveTo(x + 0.5, y + room - 0.5);
      pen.lineTo(x + room - 0.5, y + 0.5);
      pen.stroke();
    } else {
      pen.fillStyle = scale && group.scores ? rampAt(scale.at(group.scores[unit])) : kindInk(group.kind);
      pen.fillRect(x, y, room, room);
    }
  }
  const place = order ? order.indexOf(selected) : selected;
  if (place >= 0) mark(pen, ...xy(place), side - gap, side - gap);
  return {
    across,
    find(x, y) {
      const column = Math.floor(x / side), i = Math.floor(y / side) * across + column;
      return column < 0 || column >= across || i < 0 || i >= n ? null : i;
    },
  };
}

// Very many units of which nothing is known: one bar to point at.
function drawLine(canvas, group, { width, selected }) {
  const height = 24, pen = surface(canvas, width, height), n = group.size;
  pen.fillStyle = kindInk(group.kind);
  pen.fillRect(0, 4, width, height - 8);
  mark(pen, Math.min(width - 4, Math.floor((selected * width) / n)), 3, 3, height - 6);
  return { across: null, find: (x) => (x < 0 || x >= width ? null : Math.floor((x / width) * n)) };
}

function mark(pen, x, y, width, height) {
  pen.lineWidth = 2;
  pen.strokeStyle = theme.card;
  pen.strokeRect(x - 2, y - 2, width + 4, height + 4);
  pen.strokeStyle = theme.focus;
  pen.strokeRect(x - 1, y - 1, width + 2, height + 2);
  pen.lineWidth = 1;
}

// Units as bars; where there are more than pixels, a bar is the largest of several, and its foot tells the share that is removed.
function drawBars(canvas, group, { width, order, selected }) {
  const scale = scaleOf([group], false);
  const height = 170, left = 52, foot = 10, pen = surface(canvas, width, height), n = group.size;
  const room = width - left, top = 8, base = height - foot, bars = Math.min(n, Math.floor(room));
  const floor = scale.log ? 0.04 : 0; // the least positive score still has a bar
  const zero = !scale.log && scale.low < 0 ? scale.at(0) : 0;
  const tallest = (s) => (scale.log ? floor + (1 - floor) * scale.at(s) : scale.low >= 0 ? s / (scale.high || 1) : scale.at(s));
  const y = (t) => base - t * (base - top);
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "right";
  for (const [t, s] of [[1, scale.high], [floor, scale.log ? scale.least : Math.min(scale.low, 0)]]) {
    pen.strokeStyle = theme.line;
    pen.beginPath();
    pen.moveTo(left, Math.round(y(t)) + 0.5);
    pen.lineTo(width, Math.round(y(t)) + 0.5);
    pen.stroke();
    pen.fillStyle = theme.soft;
    pen.fillText(number(s), left - 6, y(t) + 4);
  }
  const wide = room / bars, span = (b) => [Math.floor((b * n) / bars), Math.max(Math.floor((b * n) / bars) + 1, Math.floor(((b + 1) * n) / bars))];
  for (let b = 0; b < bars; b++) {
    const [from, to] = span(b);
    let best = null, gone = 0;
    for (let i = from; i < to; i++) {
      const unit = order ? order[i] : i, s = group.scores[unit];
      if (s !== null && (best === null || s > best)) best = s;
      gone += group.keep ? 1 - group.keep[unit] : 0;
    }
    const share = gone / (to - from), x = left + b * wide, thick = Math.max(0.5, wide - (wide > 3 ? 1 : 0));
    pen.fillStyle = share > 0.5 ? theme.gone : theme.kept;
    if (best !== null) pen.fillRect(x, y(Math.max(tallest(best), zero)), thick, Math.max(1, Math.abs(y(tallest(best)) - y(zero))));
    if (share > 0) { pen.fillStyle = theme.gone; pen.fillRect(x, base + 4, thick, 4 * share + 1); }
  }
  const place = order ? order.indexOf(selected) : selected;
  if (place >= 0) mark(pen, left + Math.floor((place * bars) / n) * wide, top, Math.max(1, wide - 1), base - top);
  return {
    across: null,
    find(x) { return x < left || x >= width ? null : Math.min(n - 1, Math.floor(((x - left) / room) * n)); },
  };
}
