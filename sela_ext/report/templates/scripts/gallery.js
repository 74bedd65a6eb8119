// The gallery: sorting, filtering and searching the cards, a page of them at a time.
{
  const gallery = byId("gallery");
  const said = byId("gallery-said");
  const more = byId("more");
  const [find, sort, direction, filter] = ["find", "sort", "direction", "filter"].map(byId);
  const PAGE = 48;
  const even = Number(gallery.dataset.even);
  const all = [...cards.values()].map((card) => ({
    card,
    k: Number(card.dataset.k),
    ...Object.fromEntries(
      ["size", "confidence", "purity", "entropy"].map((name) => [name, card.dataset[name] === "" ? NaN : Number(card.dataset[name])]),
    ),
  }));
  const filters = {
    all: () => true,
    large: (one) => one.size > even,
    small: (one) => one.size < even,
    sure: (one) => one.confidence >= 0.8,
    unsure: (one) => one.confidence < 0.5,
    pure: (one) => one.purity >= 0.8,
    mixed: (one) => one.purity < 0.5,
  };
  let limit = PAGE;
  let shown = [];

  /** What a search looks at: the words of the card and the names of its images. */
  function words(one) {
    one.words ??= [one.card.textContent, ...[...one.card.querySelectorAll("[title]")].map((image) => image.title)]
      .join("\n").toLowerCase();
    return one.words;
  }

  function matches(one, text) {
    if (!text) return true;
    return /^\d+$/.test(text) ? String(one.k) === text : words(one).includes(text);
  }

  function show() {
    const key = sort.value;
    const sign = direction.getAttribute("aria-pressed") === "true" ? 1 : -1;
    const text = find.value.trim().toLowerCase();
    const rank = (one) => (Number.isNaN(one[key]) ? Infinity : sign * one[key]); // what is not known comes last
    shown = all.filter((one) => filters[filter.value](one) && matches(one, text));
    shown.sort((a, b) => (rank(a) === rank(b) ? a.k - b.k : rank(a) < rank(b) ? -1 : 1));
    const visible = new Set(shown.slice(0, limit).map((one) => one.card));
    for (const one of all) one.card.hidden = !visible.has(one.card);
    gallery.append(...shown.map((one) => one.card));
    const seen = visible.size;
    const what = shown.length === all.length ? "" : ` of ${all.length.toLocaleString("en-US")}`;
    const part = seen < shown.length ? `, the first ${seen} are shown` : "";
    said.textContent = `${shown.length.toLocaleString("en-US")}${what} clusters${part}.`;
    more.hidden = seen >= shown.length;
  }

  const changed = () => {
    limit = PAGE;
    show();
  };
  for (const control of [find, sort, filter]) control.addEventListener("input", changed);
  direction.addEventListener("click", () => {
    const low = direction.getAttribute("aria-pressed") !== "true";
    direction.setAttribute("aria-pressed", String(low));
    direction.textContent = low ? "Low to high" : "High to low";
    changed();
  });
  more.addEventListener("click", () => {
    const next = shown[limit];
    limit += PAGE;
    show();
    next?.card.querySelector("button")?.focus();
  });

  /** Bring a card into view, whatever hides it. */
  function reveal(k) {
    const one = all.find((other) => other.k === k);
    if (!one) return;
    if (one.card.hidden) {
      find.value = "";
      filter.value = "all";
      limit = Infinity;
      show();
    }
    one.card.scrollIntoView({ block: "start" });
    one.card.querySelector("button").focus({ preventScroll: true });
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#cluster-"]');
    if (!link) return;
    event.preventDefault();
    history.replaceState(null, "", link.hash);
    reveal(Number(link.hash.slice("#cluster-".length)));
  });
  for (const { card, k } of all) {
    const button = make("button", { type: "button", "aria-label": `Open cluster ${k}` }, "Open");
    button.addEventListener("click", () => panel.open(k, shown.map((one) => one.k)));
    card.querySelector("header").append(button);
  }
  byId("gallery-controls").hidden = all.length < 2;
  show();
  if (/^#cluster-\d+$/.test(location.hash)) reveal(Number(location.hash.slice("#cluster-".length)));
  // On paper all of them: what is hidden is hidden from a reader who can ask for it.
  let printed = PAGE;
  window.addEventListener("beforeprint", () => {
    printed = limit;
    limit = Math.max(limit, 400);
    show();
  });
  window.addEventListener("afterprint", () => {
    limit = printed;
    show();
  });
}
