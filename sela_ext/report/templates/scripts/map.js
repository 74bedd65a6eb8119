// The map: images as dots; the one pointed at is shown beside it, and all that share its colour stay bright.
const mapData = dataOf("data-map");
if (mapData) {
  const COLOURS = 12;
  const plot = byId("map-plot");
  const svg = plot.querySelector("svg");
  const said = byId("map-said");
  const keys = byId("map-keys");
  const [layout, colour] = [byId("map-layout"), byId("map-colour")];
  const count = mapData.names.length;
  const dots = [];
  let places = [];
  let at = -1;

  const groupOf = (i) => mapData[colour.value][i];
  const nameOf = (group, kind = colour.value) => {
    if (group < 0) return kind === "cluster" ? "no cluster" : "class not known";
    return kind === "cluster" ? `cluster ${group}` : mapData.classes[group];
  };

  /** Places spread over the drawing; one axis is stretched at most twice as much as the other. */
  function fitted(points) {
    const [left, bottom, width, height] = [30, 970, 1440, 940];
    const axes = [0, 1].map((axis) => points.map((point) => point[axis]));
    const [low, high] = [axes.map((one) => Math.min(...one)), axes.map((one) => Math.max(...one))];
    const full = [width / Math.max(high[0] - low[0], 1), height / Math.max(high[1] - low[1], 1)];
    const scale = full.map((one) => Math.min(one, 2 * Math.min(...full)));
    const middle = [0, 1].map((axis) => (low[axis] + high[axis]) / 2);
    return points.map(([x, y]) => [
      left + width / 2 + (x - middle[0]) * scale[0], bottom - height / 2 - (y - middle[1]) * scale[1],
    ]);
  }

  function draw() {
    places = fitted(mapData.layouts[layout.value]);
    for (let i = 0; i < count; i += 1) {
      dots[i] ??= svg.appendChild(makeSvg("circle", { r: count > 2000 ? 6 : 8 }));
      dots[i].setAttribute("cx", places[i][0]);
      dots[i].setAttribute("cy", places[i][1]);
      const group = groupOf(i);
      dots[i].setAttribute("class", `e${group < 0 ? 11 : group % COLOURS}`);
    }
    const groups = [...new Set(mapData[colour.value])].filter((group) => group >= 0).sort((a, b) => a - b);
    keys.replaceChildren();
    if (groups.length <= COLOURS) {
      for (const group of groups) {
        keys.append(make("li", {}, make("span", { class: `dot e${group % COLOURS}` }), nameOf(group)));
      }
    } else {
      keys.append(make("li", {}, `${groups.length} ${colour.value === "cluster" ? "clusters" : "classes"}: colours repeat.`));
    }
    tell(at);
  }

  function picture(i) {
    const place = mapData.thumbnails[i];
    const found = place && thumbnailsByPlace.get(place[0] * 256 + place[2] * 16 + place[1]);
    return found ? [copyOf(found)] : [];
  }

  function tell(i) {
    at = i;
    svg.classList.toggle("dim", i >= 0);
    dots.forEach((dot, j) => {
      dot.classList.toggle("at", j === i);
      dot.classList.toggle("same", i >= 0 && groupOf(j) === groupOf(i));
    });
    if (i < 0) {
      said.replaceChildren(make("p", {}, "Point at a dot, or press the arrow keys on the map, to see an image."));
      return;
    }
    const k = mapData.cluster[i];
    const lines = [make("p", {}, make("b", {}, mapData.names[i]))];
    if (k >= 0) {
      const link = cards.has(k) ? make("a", { href: `#cluster-${k}` }, `cluster ${k}`) : `cluster ${k}`;
      lines.push(make("p", {}, "In ", link, "."));
    } else {
      lines.push(make("p", {}, "It has no cluster."));
    }
    if (mapData.truth) lines.push(make("p", {}, `True class: ${nameOf(mapData.truth[i], "truth")}.`));
    said.replaceChildren(...picture(i), ...lines);
  }

  function nearestTo(x, y, most) {
    let best = -1;
    let least = most * most;
    places.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  /** The next dot in a direction: near, and not far to the side. */
  function next(dx, dy) {
    if (at < 0) return nearestTo(750, 500, Infinity);
    const [x, y] = places[at];
    let best = at;
    let least = Infinity;
    places.forEach(([px, py], i) => {
      const along = (px - x) * dx + (py - y) * dy;
      const aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      if (along > 0.5 && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
    });
    return best;
  }

  const toMap = (event) => {
    const spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [spot.x, spot.y];
  };
  let kept = false; // a click keeps an image beside the map while the pointer leaves it
  plot.addEventListener("pointermove", (event) => {
    const found = nearestTo(...toMap(event), 45);
    if (found >= 0 && !kept) tell(found);
  });
  plot.addEventListener("pointerdown", (event) => {
    const found = nearestTo(...toMap(event), 45);
    kept = found >= 0 && !(kept && found === at);
    tell(found);
  });
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) tell(next(...moves[event.key]));
    else if (event.key === "Escape") {
      kept = false;
      tell(-1);
    } else if (event.key === "Enter" && at >= 0 && cards.has(mapData.cluster[at])) panel.open(mapData.cluster[at]);
    else return;
    event.preventDefault();
  });
  for (const control of [layout, colour]) control.addEventListener("input", draw);
  draw();
}
