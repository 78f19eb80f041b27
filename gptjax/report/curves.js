"use strict";
// Draws the panels of a report as SVG, from the JSON in #data. It loads nothing, and puts text in as text only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = 8;
  const MOST_LAYERS = 12; // whose values are all shown next to the pointer
  const MARGIN = { left: 54, right: 12, top: 8, bottom: 22 };
  const AXES = { step: "step", tokens: "tokens", seconds: "time", flops: "FLOPs" };
  const figures = [...document.querySelectorAll("figure")];
  const drawn = new Map(); // figure -> what `point` needs to find values

  // The choices of a reader survive a reload. In a notebook's frame there is no storage.
  const state = { axis: "step", zoom: null, hidden: {}, log: {}, off: {}, open: {} };
  const KEY = "gptjax " + location.pathname;
  try { Object.assign(state, JSON.parse(sessionStorage.getItem(KEY))); } catch { /* the defaults stay */ }
  const save = () => { try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* they are lost */ } };

  for (const run of data.runs) {
    for (const curve of [...Object.values(run.curves), run.seconds].filter(Boolean)) {
      let step = 0;
      curve.s = curve.s.map((difference) => (step += difference));
    }
  }

  const element = (parent, name, attributes = {}, text = "") => {
    const made = parent.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };

  // Returns the last index of ascending numbers whose value is at most x, or 0.
  const indexBefore = (numbers, x) => {
    let low = 0, high = numbers.length - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (numbers[middle] <= x) low = middle; else high = middle - 1;
    }
    return low;
  };

  const axisOf = (run) => { // step -> x, or null where the run does not know it
    if (state.axis === "step") return (step) => step;
    if (state.axis !== "seconds") return run[state.axis] ? (step) => step * run[state.axis] : null;
    if (!run.seconds) return null;
    const { s, v } = run.seconds;
    return (step) => {
      const i = indexBefore(s, step);
      if (i + 1 >= s.length) return v[i];
      return v[i] + ((v[i + 1] - v[i]) * (step - s[i])) / (s[i + 1] - s[i]);
    };
  };

  const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
  const short = (value, percent) => {
    if (percent) return `${+(100 * value).toPrecision(4)} %`;
    const size = Math.abs(value);
    if (size >= 1e15 || (size && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("+", "");
    return size >= 1e4 ? COMPACT.format(value) : `${+value.toPrecision(5)}`;
  };
  const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const unitOf = (seconds) => UNITS.find(([size]) => seconds >= 2 * size) || [1, "s"];
  const shortX = (x, [size, unit]) => {
    if (state.axis === "seconds") return `${+(x / size).toPrecision(3)} ${unit}`;
    return state.axis === "step" && x < 1e6 ? Math.round(x).toLocaleString("en") : short(x);
  };

  // Returns round numbers from low to high, about `count`, which differ by at least `least`.
  const ticks = (low, high, count, least = 0) => {
    const rough = Math.max(least, (high - low) / count);
    const power = 10 ** Math.floor(Math.log10(rough));
    const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(i * size);
    return found;
  };
  const logTicks = (low, high) => {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) found.push(...[1, 2, 5].map((f) => f * 10 ** e));
    const inside = found.filter((value) => value >= low && value <= high);
    if (inside.length < 3) return ticks(low, high, 4).filter((value) => value > 0);
    return inside.length > 8 ? inside.filter((value) => /^1e/.test(value.toExponential())) : inside;
  };

  // Returns the first and the last x of all curves, so that all panels have the same axis.
  const domain = () => {
    let [left, right] = [Infinity, -Infinity];
    for (const run of data.runs) {
      const toX = state.hidden[run.name] ? null : axisOf(run);
      for (const { s } of toX ? Object.values(run.curves) : []) {
        left = Math.min(left, toX(s[0]));
        right = Math.max(right, toX(s[s.length - 1]));
      }
    }
    return right > left ? [left, right] : [left - 1, right + 1];
  };

  const linesOf = (number) => {
    const found = [];
    data.runs.forEach((run, index) => {
      const toX = state.hidden[run.name] ? null : axisOf(run);
      for (const line of toX ? data.panels[number].lines : []) {
        const curve = run.curves[line.name];
        if (!curve || (number === 0 && state.off[line.label])) continue;
        let points = curve.s.map((step, i) => [toX(step), curve.v[i], curve.e?.[i] || 0]);
        if (state.zoom) points = points.filter(([x]) => x >= state.zoom[0] && x <= state.zoom[1]);
        if (!points.length) continue;
        const [xs, ys, errors] = [0, 1, 2].map((part) => points.map((point) => point[part]));
        found.push({ run, index, line, xs, ys, errors });
      }
    });
    return found;
  };

  const wantsLog = (panel) => state.log[panel.title] ?? panel.log;

  const draw = (figure) => {
    const number = +figure.dataset.panel;
    const panel = data.panels[number];
    const lines = linesOf(number);
    const box = figure.querySelector(".drawing");
    const width = Math.max(240, box.clientWidth);
    const height = figure.classList.contains("large") ? Math.min(380, Math.max(240, width * 0.45)) : 190;
    box.replaceChildren();
    drawn.delete(figure);
    const svg = element(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0 });
    svg.setAttribute("aria-label", panel.title);
    if (!lines.length) {
      element(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no data on this axis");
      return;
    }
    let [low, high] = [Infinity, -Infinity];
    for (const { ys, errors } of lines) {
      ys.forEach((y, i) => { low = Math.min(low, y - errors[i]); high = Math.max(high, y + errors[i]); });
    }
    const [left, right] = state.zoom || domain();
    const isLog = wantsLog(panel) && low > 0;
    const scale = isLog ? Math.log10 : (y) => y;
    const pad = 0.04 * (scale(high) - scale(low)) || Math.abs(0.1 * scale(high)) || 1;
    const [bottom, top] = [scale(low) - pad, scale(high) + pad];
    const toX = (x) => MARGIN.left + ((x - left) / (right - left)) * (width - MARGIN.left - MARGIN.right);
    const toY = (y) => MARGIN.top + ((top - scale(y)) / (top - bottom)) * (height - MARGIN.top - MARGIN.bottom);
    const deepest = []; // the last layer of each run
    for (const { index, line } of lines) deepest[index] = Math.max(deepest[index] ?? 0, line.layer);
    drawAxes(svg, { panel, isLog, left, right, low, high, bottom, top, toX, toY, width, height });
    for (const { run, index, line, xs, ys, errors } of lines) {
      const colour = `c${index % COLOURS}`;
      const opacity = line.layer < 0 ? 1 : 0.2 + 0.8 * (deepest[index] ? line.layer / deepest[index] : 1);
      const path = xs.map((x, i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(ys[i]).toFixed(1)}`).join("");
      element(svg, "path", { d: path, class: `curve ${line.style} ${colour}`, "data-run": run.name, "data-name": line.name, "stroke-opacity": opacity });
      if (xs.length > 1 && (line.style !== "dots" || xs.length > 60) && !errors.some(Boolean)) continue;
      xs.forEach((x, i) => {
        element(svg, "circle", { cx: toX(x), cy: toY(ys[i]), r: 2.6, class: colour, opacity });
        const error = errors[i];
        if (!error || (isLog && ys[i] <= error)) return;
        element(svg, "line", { x1: toX(x), x2: toX(x), y1: toY(ys[i] - error), y2: toY(ys[i] + error), class: `spread ${colour}` });
      });
    }
    if (figure.classList.contains("large")) drawMarks(svg, { left, right, toX, height });
    const cross = element(svg, "line", { class: "cross", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    drawn.set(figure, { svg, lines, cross, left, right, toX, width, height, percent: panel.percent });
  };

  const drawAxes = (svg, { panel, isLog, left, right, low, high, bottom, top, toX, toY, width, height }) => {
    for (const y of isLog ? logTicks(low, high) : ticks(bottom, top, height / 50)) {
      element(svg, "line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: toY(y), y2: toY(y) });
      element(svg, "text", { x: MARGIN.left - 6, y: toY(y) + 4, "text-anchor": "end" }, short(y, panel.percent));
    }
    const unit = unitOf(right);
    const size = state.axis === "seconds" ? unit[0] : 1;
    const least = state.axis === "step" ? 1 : 0;
    for (const x of ticks(left / size, right / size, Math.max(3, width / 80), least).map((x) => x * size)) {
      const anchor = toX(x) > width - 30 ? "end" : toX(x) < 30 ? "start" : "middle";
      element(svg, "text", { x: toX(x), y: height - 6, "text-anchor": anchor }, shortX(x, unit));
    }
  };

  const drawMarks = (svg, { left, right, toX, height }) => {
    for (const [index, run] of data.runs.entries()) {
      const toAxis = state.hidden[run.name] ? null : axisOf(run);
      for (const mark of toAxis ? run.marks : []) {
        const x = toAxis(mark.step);
        if (x < left || x > right) continue;
        const ends = { x1: toX(x), x2: toX(x), y1: MARGIN.top, y2: height - MARGIN.bottom };
        const line = element(svg, "line", { class: `mark c${index % COLOURS}`, ...ends });
        element(line, "title", {}, `${run.name}, step ${mark.step}: ${mark.why}`);
      }
    }
  };

  // Shows a vertical line at x in every panel, and the values there in the panel that is pointed at.
  const point = (figure, x) => {
    for (const { cross, toX, left, right } of drawn.values()) {
      const isInside = x !== null && x >= left && x <= right;
      cross.setAttribute("visibility", isInside ? "visible" : "hidden");
      if (isInside) { cross.setAttribute("x1", toX(x)); cross.setAttribute("x2", toX(x)); }
    }
    document.querySelector(".tip")?.remove();
    const found = drawn.get(figure);
    if (x === null || !found) return;
    const tip = document.createElement("div");
    tip.className = "tip";
    const add = (...texts) => {
      const row = tip.appendChild(document.createElement("div"));
      for (const text of texts) row.appendChild(document.createElement("span")).textContent = text;
      return row;
    };
    add(AXES[state.axis], shortX(x, unitOf(found.right)));
    const slack = (found.right - found.left) / 100; // a curve that ended before x has no value there
    for (const [index, run] of data.runs.entries()) {
      let values = [];
      for (const { run: owner, line, xs, ys, errors } of found.lines) {
        if (owner !== run || x < xs[0] - slack || x > xs[xs.length - 1] + slack) continue;
        let i = indexBefore(xs, x);
        if (i + 1 < xs.length && xs[i + 1] - x < x - xs[i]) i += 1;
        values.push({ label: line.label, layer: line.layer, y: ys[i], error: errors[i] });
      }
      if (!values.length) continue;
      if (data.runs.length > 1) add("", run.name).firstChild.className = `key c${index % COLOURS}`;
      const layers = values.filter(({ layer }) => layer >= 0).sort((a, b) => b.y - a.y);
      if (layers.length > MOST_LAYERS) {
        const middle = layers[layers.length >> 1];
        const others = values.filter(({ layer }) => layer < 0);
        values = [layers[0], { ...middle, label: `median, ${middle.label}` }, layers[layers.length - 1], ...others];
      }
      for (const { label, y, error } of values) {
        add(label, short(y, found.percent) + (error ? ` ± ${short(error, found.percent)}` : ""));
      }
    }
    figure.appendChild(tip);
    const at = found.svg.getBoundingClientRect();
    const px = at.left - figure.getBoundingClientRect().left + (found.toX(x) * at.width) / found.width;
    const isRight = px + tip.offsetWidth + 14 > figure.clientWidth;
    tip.style.left = `${Math.max(0, isRight ? px - tip.offsetWidth - 10 : px + 10)}px`;
    tip.style.top = "2.2rem";
    found.x = x;
  };

  const xAt = (found, event) => {
    const box = found.svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) * found.width) / box.width;
    const share = (px - MARGIN.left) / (found.width - MARGIN.left - MARGIN.right);
    return found.left + Math.min(1, Math.max(0, share)) * (found.right - found.left);
  };

  // With a mouse, a stretch that is dragged over becomes the whole width of every panel.
  let drag = null; // { figure, from, shade }
  const moved = (figure, event) => {
    const found = drawn.get(figure);
    if (!found) return;
    const x = xAt(found, event);
    if (drag?.figure === figure) {
      drag.shade.setAttribute("x", found.toX(Math.min(x, drag.from)));
      drag.shade.setAttribute("width", Math.abs(found.toX(x) - found.toX(drag.from)));
    }
    point(figure, x);
  };
  const pressed = (figure, event) => {
    const found = drawn.get(figure);
    if (found && event.pointerType === "mouse" && event.button === 0) {
      event.preventDefault();
      const shade = element(found.svg, "rect", { class: "zoom", y: MARGIN.top, height: found.height - MARGIN.top - MARGIN.bottom });
      drag = { figure, from: xAt(found, event), shade };
    }
    moved(figure, event);
  };
  const released = (figure, event) => {
    const found = drawn.get(figure);
    if (!drag || !found || drag.figure !== figure) return;
    const ends = [drag.from, xAt(found, event)].sort((a, b) => a - b);
    drag.shade.remove();
    drag = null;
    if (found.toX(ends[1]) - found.toX(ends[0]) > 8) { state.zoom = ends; drawAll(); }
  };

  const press = (button, isPressed) => button.setAttribute("aria-pressed", isPressed);
  const drawAll = () => {
    figures.forEach((figure) => { if (figure.querySelector(".drawing").clientWidth) draw(figure); });
    whole.hidden = !state.zoom;
    save();
  };

  const makeButton = (parent, text, { isPressed, change, name = "" }) => {
    const button = parent.appendChild(document.createElement("button"));
    button.textContent = text;
    button.className = name;
    press(button, isPressed);
    button.onclick = () => { change(button); drawAll(); };
    return button;
  };

  const axes = document.querySelector(".axes");
  const whole = document.querySelector("button.whole");
  whole.onclick = () => { state.zoom = null; drawAll(); };
  for (const [axis, label] of Object.entries(AXES)) {
    const isKnown = axis === "step" || data.runs.some((run) => run[axis]);
    if (!isKnown && state.axis === axis) state.axis = "step";
    if (!isKnown) continue;
    makeButton(axes, label, {
      isPressed: state.axis === axis,
      change: (chosen) => { state.axis = axis; state.zoom = null; [...axes.children].forEach((button) => press(button, button === chosen)); },
    });
  }
  for (const button of document.querySelectorAll("button.run")) {
    const { name } = data.runs[+button.dataset.run];
    press(button, !state.hidden[name]);
    button.onclick = () => { state.hidden[name] = !state.hidden[name]; press(button, !state.hidden[name]); drawAll(); };
  }
  for (const figure of figures) {
    const panel = data.panels[+figure.dataset.panel];
    const log = figure.querySelector("button.log");
    press(log, wantsLog(panel));
    log.onclick = () => { state.log[panel.title] = !wantsLog(panel); press(log, wantsLog(panel)); drawAll(); };
    const isLarge = figure.classList.contains("large");
    for (const { label, style } of panel.lines.filter((line) => line.label && isLarge)) {
      makeButton(figure.querySelector("figcaption"), label, {
        isPressed: !state.off[label],
        name: `line is-${style}`,
        change: (button) => { state.off[label] = !state.off[label]; press(button, !state.off[label]); },
      });
    }
    const box = figure.querySelector(".drawing");
    box.onpointermove = (event) => moved(figure, event);
    box.onpointerdown = (event) => pressed(figure, event);
    box.onpointerup = (event) => released(figure, event);
    box.onpointerleave = (event) => { released(figure, event); point(figure, null); };
    box.onkeydown = (event) => {
      const found = drawn.get(figure);
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!found || !move) return;
      event.preventDefault();
      const x = (found.x ?? found.left) + (move * (found.right - found.left)) / 50;
      point(figure, Math.min(found.right, Math.max(found.left, x)));
    };
  }
  for (const [number, details] of [...document.querySelectorAll("details")].entries()) {
    const key = `${number} ${details.querySelector("summary").textContent}`;
    if (key in state.open) details.open = state.open[key];
    details.ontoggle = () => { state.open[key] = details.open; drawAll(); };
  }

  let lastWidth = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== lastWidth) { lastWidth = document.body.clientWidth; drawAll(); }
  }).observe(document.body);
  drawAll();
  const seconds = +document.body.dataset.reload;
  // A reader who is looking something up is not interrupted.
  if (seconds) setInterval(() => { if (!document.hidden && !document.querySelector(".tip")) location.reload(); }, 1000 * seconds);
})();
