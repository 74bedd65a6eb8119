// Charts that can be read off: pointing or arrow keys read values, dragging or + and - change the range, legend entries
// show and hide curves. The drawing that came with the page is replaced by one of the same looks.
const FRAME = { left: 68, right: 624, top: 14, bottom: 240, width: 640, height: 280 };

function niceTicks(low, high, most) {
  if (!(high > low)) return [low];
  const raw = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= raw * (1 - 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i += 1) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

class CurveChart {
  constructor(figure, data) {
    this.data = data;
    this.figure = figure;
    this.svg = figure.querySelector("svg");
    this.hidden = new Set();
    const all = data.series.flatMap((one) => one.points);
    this.full = [Math.min(...all.map((point) => point[0])), Math.max(...all.map((point) => point[0]))];
    if (!(this.full[1] > this.full[0])) this.full = [this.full[0] - 0.5, this.full[1] + 0.5];
    this.range = [...this.full];
    this.at = null;
    this.build();
    this.draw();
  }

  build() {
    const title = this.figure.querySelector("h3").textContent;
    this.plot = make("div", {
      class: "plot", tabindex: "0", role: "group",
      "aria-label": `${title}: left and right arrow keys read values, plus and minus change the range, 0 shows all`,
    });
    this.svg.replaceWith(this.plot);
    this.plot.append(this.svg);
    this.readout = make("output", { class: "readout", "aria-live": "polite" });
    const tool = (text, label, action) => {
      const button = make("button", { type: "button", "aria-label": `${title}: ${label}` }, text);
      button.addEventListener("click", action);
      return button;
    };
    const tools = make(
      "div", { class: "tools" },
      tool("+", "look closer", () => this.zoom(0.5)),
      tool("\u2212", "look at more", () => this.zoom(2)),
      (this.reset = tool("All", "show all", () => this.show(this.full))),
    );
    this.plot.after(tools, this.readout);
    for (const item of this.figure.querySelectorAll(".legend li")) this.makeToggle(item);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => {
      if (!this.dragged) this.read(null);
    });
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0) this.dragged = { from: this.xAt(event), to: this.xAt(event) };
    });
    window.addEventListener("pointerup", () => this.drop());
    this.plot.addEventListener("dblclick", () => this.show(this.full));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  makeToggle(item) {
    const group = item.textContent.trim();
    const button = make("button", { type: "button", "aria-pressed": "true" }, ...item.childNodes);
    item.replaceChildren(button);
    button.addEventListener("click", () => {
      const off = !this.hidden.delete(group);
      if (off) this.hidden.add(group);
      button.setAttribute("aria-pressed", String(!off));
      this.draw();
      this.read(this.at);
    });
  }

  get shown() {
    return this.data.series.filter((one) => !this.hidden.has(one.group));
  }

  toX(value) {
    return FRAME.left + ((value - this.range[0]) / (this.range[1] - this.range[0])) * (FRAME.right - FRAME.left);
  }

  toY(value) {
    const [low, high] = this.height;
    return FRAME.bottom - ((value - low) / (high - low)) * (FRAME.bottom - FRAME.top);
  }

  /** The x value under a pointer. */
  xAt(event) {
    const box = this.svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * FRAME.width;
    const share = Math.min(1, Math.max(0, (place - FRAME.left) / (FRAME.right - FRAME.left)));
    return this.range[0] + share * (this.range[1] - this.range[0]);
  }

  point(event) {
    const x = this.xAt(event);
    if (this.dragged) {
      this.dragged.to = x;
      this.drawBrush();
    } else {
      this.read(x);
    }
  }

  drop() {
    if (!this.dragged) return;
    const { from, to } = this.dragged;
    this.dragged = null;
    this.brush?.remove();
    if (Math.abs(this.toX(to) - this.toX(from)) > 8) this.show([Math.min(from, to), Math.max(from, to)]);
  }

  key(event) {
    const places = this.places();
    if (!places.length) return;
    const here = this.at === null ? -1 : places.findIndex((x) => x >= this.at - 1e-12);
    const moves = { ArrowRight: here + 1, ArrowLeft: here < 0 ? places.length - 1 : here - 1, Home: 0, End: places.length - 1 };
    if (event.key in moves) this.read(places[Math.min(places.length - 1, Math.max(0, moves[event.key]))]);
    else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0" || event.key === "Escape") this.show(this.full);
    else return;
    event.preventDefault();
  }

  /** Where there is something to read: the points of the leading curve within the range. */
  places() {
    const measured = this.shown.filter((one) => !one.dashed);
    const leading = measured.filter((one) => one.strong).at(-1) || measured.at(-1);
    if (!leading) return [];
    return leading.points.filter((p) => p[1] !== null && p[0] >= this.range[0] && p[0] <= this.range[1]).map((p) => p[0]);
  }

  zoom(factor) {
    const middle = this.at ?? (this.range[0] + this.range[1]) / 2;
    const share = (middle - this.range[0]) / (this.range[1] - this.range[0]);
    const width = Math.min(this.full[1] - this.full[0], (this.range[1] - this.range[0]) * factor);
    if (width < (this.full[1] - this.full[0]) * 1e-3) return;
    const low = Math.min(this.full[1] - width, Math.max(this.full[0], middle - share * width));
    this.show([low, low + width]);
  }

  show(range) {
    this.range = [Math.max(this.full[0], range[0]), Math.min(this.full[1], range[1])];
    if (!(this.range[1] > this.range[0])) this.range = [...this.full];
    this.draw();
    this.read(this.at !== null && this.at >= this.range[0] && this.at <= this.range[1] ? this.at : null);
  }

  /** The range of y: of all that is shown, as the drawing that came with the page has it. */
  findHeight() {
    const inside = this.shown.flatMap((one) => one.points).filter(
      (p) => p[1] !== null && p[0] >= this.range[0] && p[0] <= this.range[1],
    ).map((p) => p[1]);
    if (!inside.length) return [0, 1];
    const whole = this.range[0] === this.full[0] && this.range[1] === this.full[1];
    let low = Math.min(...inside);
    let high = Math.max(...inside);
    const positive = low >= 0;
    if (whole && this.data.ceiling !== null) high = Math.max(high, this.data.ceiling);
    if (whole && this.data.fromZero && positive) low = 0;
    const room = high > low ? 0.04 * (high - low) : Math.abs(low) * 0.1 || 0.5;
    return [
      whole && this.data.fromZero && positive ? 0 : low - room,
      whole && this.data.ceiling !== null && high <= this.data.ceiling ? this.data.ceiling : high + room,
    ];
  }

  draw() {
    this.height = this.findHeight();
    const { left, right, top, bottom, width, height } = FRAME;
    const id = `clip-${this.figure.dataset.curves}`;
    const grid = makeSvg("g", { class: "grid" });
    for (const value of niceTicks(...this.height, 5)) {
      const y = this.toY(value);
      grid.append(makeSvg("line", { x1: left, x2: right, y1: y, y2: y }));
      grid.append(makeSvg("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, shortNumber(value)));
    }
    for (const value of niceTicks(...this.range, 8)) {
      grid.append(makeSvg("text", { x: this.toX(value), y: bottom + 17, "text-anchor": "middle" }, shortNumber(value)));
    }
    grid.append(makeSvg("text", { class: "axis", x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, this.data.x));
    const turned = `translate(11 ${(top + bottom) / 2}) rotate(-90)`;
    grid.append(makeSvg("text", { class: "axis", transform: turned, "text-anchor": "middle" }, this.data.y));
    grid.append(makeSvg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }));
    const clip = makeSvg("clipPath", { id }, makeSvg("rect", { x: left - 4, y: 0, width: right - left + 8, height: bottom + 4 }));
    const lines = makeSvg("g", { "clip-path": `url(#${id})` });
    for (const one of this.shown) this.drawCurve(lines, one);
    this.marks = makeSvg("g");
    this.svg.replaceChildren(clip, grid, lines, this.marks);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.reset.disabled = this.range[0] === this.full[0] && this.range[1] === this.full[1];
  }

  drawCurve(lines, one) {
    let path = "";
    let down = false;
    const dots = [];
    for (const [x, y] of one.points) {
      if (y !== null) {
        const place = `${this.toX(x).toFixed(2)} ${this.toY(y).toFixed(2)}`;
        path += `${down ? "L" : "M"}${place}`;
        if (x >= this.range[0] && x <= this.range[1]) dots.push(place.split(" "));
      }
      down = y !== null;
    }
    const looks = `c${one.colour}${one.strong ? " strong" : ""}${one.dashed ? " dashed" : ""}`;
    lines.append(makeSvg("path", { class: looks, d: path }));
    if (dots.length === 1 || (one.strong && !one.dashed && dots.length <= 40)) {
      for (const [cx, cy] of dots) lines.append(makeSvg("circle", { class: `c${one.colour}`, cx, cy, r: 3 }));
    }
  }

  drawBrush() {
    this.brush?.remove();
    const [from, to] = [this.toX(this.dragged.from), this.toX(this.dragged.to)];
    this.brush = makeSvg("rect", {
      class: "brush", x: Math.min(from, to), width: Math.abs(to - from), y: FRAME.top, height: FRAME.bottom - FRAME.top,
    });
    this.svg.append(this.brush);
  }

  /** Tell the values of all shown curves next to x. */
  read(x) {
    this.marks.replaceChildren();
    this.at = null;
    if (x === null) {
      this.readout.replaceChildren();
      return;
    }
    const places = this.places();
    if (!places.length) return;
    const near = places.reduce((best, place) => (Math.abs(place - x) < Math.abs(best - x) ? place : best));
    this.at = near;
    const at = this.toX(near);
    this.marks.append(makeSvg("line", { class: "cursor", x1: at, x2: at, y1: FRAME.top, y2: FRAME.bottom }));
    const said = [];
    for (const one of [...this.shown].filter((curve) => !curve.dashed).sort((a, b) => b.strong - a.strong)) {
      const known = one.points.filter((p) => p[1] !== null);
      if (!known.length) continue;
      const p = known.reduce((best, q) => (Math.abs(q[0] - near) < Math.abs(best[0] - near) ? q : best));
      said.push(`${one.name} ${shortNumber(p[1])}`);
      this.marks.append(makeSvg("circle", { class: `c${one.colour} knob`, cx: this.toX(p[0]), cy: this.toY(p[1]), r: 4 }));
    }
    const rest = said.length > 9 ? `; ${said.length - 8} more` : "";
    this.readout.replaceChildren(
      make("b", {}, `${this.data.x} ${shortNumber(near)}`), ` \u00b7 ${said.slice(0, rest ? 8 : 9).join(", ")}${rest}`,
    );
  }
}

for (const figure of document.querySelectorAll("figure[data-curves]")) {
  const data = dataOf(`data-${figure.dataset.curves}`);
  if (data) new CurveChart(figure, data);
}

// --- Bars: the same keys read one bar after the other.
for (const figure of document.querySelectorAll("figure[data-bars]")) {
  const texts = dataOf(`data-${figure.dataset.bars}`).texts;
  const svg = figure.querySelector("svg");
  const bars = [...svg.querySelectorAll(".bar")];
  const plot = make("div", {
    class: "plot", tabindex: "0", role: "group",
    "aria-label": `${figure.querySelector("h3").textContent}: left and right arrow keys read one bar after the other`,
  });
  svg.replaceWith(plot);
  plot.append(svg);
  const readout = make("output", { class: "readout", "aria-live": "polite" });
  plot.after(readout);
  let at = -1;
  const read = (place) => {
    bars[at]?.classList.remove("on");
    at = place;
    bars[at]?.classList.add("on");
    readout.textContent = at < 0 ? "" : texts[at];
  };
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: bars.length - 1 };
    if (!(event.key in moves)) return;
    read(Math.min(bars.length - 1, Math.max(0, moves[event.key])));
    event.preventDefault();
  });
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * FRAME.width;
    const share = (x - FRAME.left) / (FRAME.right - FRAME.left);
    read(share < 0 || share >= 1 ? -1 : Math.floor(share * bars.length));
  });
  plot.addEventListener("pointerleave", () => read(-1));
}
