// The panel of one cluster: all its images of this page, its classes, clusters like it, and where other heads put it.
const headData = dataOf("data-heads");
const cards = new Map([...document.querySelectorAll("#gallery .tile")].map((card) => [Number(card.dataset.k), card]));

/** The first thumbnails of a card, as copies. */
function pictures(card, most) {
  const shown = [...card.querySelectorAll(".thumbs li > *")].slice(0, most).map(copyOf);
  return make("div", { class: "pictures" }, ...shown);
}

const panel = (() => {
  const dialog = byId("panel");
  const body = byId("panel-body");
  const title = byId("panel-title");
  let order = [];
  let number = -1;
  let opener = null;

  function nearest(card) {
    const numbers = [...card.querySelectorAll(".near a")].map((link) => Number(link.textContent));
    if (!numbers.length) return [];
    const list = make("ul", { class: "strip" });
    for (const k of numbers) {
      const button = make("button", { type: "button" }, `Cluster ${k}`, pictures(cards.get(k), 4));
      button.addEventListener("click", () => open(k, order));
      list.append(make("li", {}, button));
    }
    return [make("h3", {}, "Nearest clusters"), list];
  }

  function elsewhere(k) {
    const place = headData ? headData.clusters.indexOf(k) : -1;
    if (place < 0) return [];
    const list = make("ul");
    for (const [head, matches] of Object.entries(headData.matches)) {
      const said = matches[place].map(([other, share]) => `cluster ${other} (${share}%)`).join(", ");
      list.append(make("li", {}, `Head ${head}: ${said || "none"}`));
    }
    return [make("h3", {}, "In other heads"), list];
  }

  /** Images of the cluster; arrow keys go from one to the next, and the line above says which it is. */
  function images(card) {
    const shown = [...card.querySelectorAll(".thumbs li > *")].map(copyOf);
    const said = make("p", { class: "said", "aria-live": "polite" }, "Point at an image, or go through them with the arrow keys.");
    const list = make("ul", { class: "thumbs", "aria-label": "Images" });
    let at = 0;
    const go = (place) => {
      shown[at].tabIndex = -1;
      at = place;
      shown[at].tabIndex = 0;
      shown[at].focus();
    };
    shown.forEach((image, place) => {
      image.tabIndex = place ? -1 : 0;
      image.addEventListener("focus", () => (said.textContent = image.title));
      image.addEventListener("pointerenter", () => (said.textContent = image.title));
      list.append(make("li", {}, image));
    });
    list.addEventListener("keydown", (event) => {
      const across = getComputedStyle(list).gridTemplateColumns.split(" ").length;
      const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -at, End: shown.length - 1 - at };
      if (!(event.key in moves)) return;
      go(Math.min(shown.length - 1, Math.max(0, at + moves[event.key])));
      event.preventDefault();
    });
    const size = Number(card.dataset.size);
    const part = shown.length < size ? ` (${shown.length} of ${size.toLocaleString("en-US")})` : "";
    return [make("h3", {}, `Images${part}`), said, list];
  }

  function open(k, numbers = [...cards.keys()]) {
    const card = cards.get(k);
    if (!card) return;
    if (!dialog.open) opener = document.activeElement;
    order = numbers;
    number = k;
    title.textContent = `Cluster ${k}`;
    const facts = [...card.querySelectorAll(".facts, .main-classes")].map((one) => one.cloneNode(true));
    body.replaceChildren(...facts, ...images(card), ...nearest(card), ...elsewhere(k));
    const place = order.indexOf(k);
    byId("panel-before").disabled = place <= 0;
    byId("panel-after").disabled = place < 0 || place >= order.length - 1;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    title.focus();
  }

  const step = (by) => {
    const next = order[order.indexOf(number) + by];
    if (next !== undefined) open(next, order);
  };
  byId("panel-before").addEventListener("click", () => step(-1));
  byId("panel-after").addEventListener("click", () => step(1));
  byId("panel-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the panel
  });
  dialog.addEventListener("close", () => opener?.focus());
  return { open };
})();
