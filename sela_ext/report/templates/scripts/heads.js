// Two heads side by side: each cluster of the shown head, and the clusters of the other one that its images are in.
if (headData && byId("heads-view")) {
  const rows = byId("heads-rows");
  const other = byId("other-head");
  const more = byId("heads-more");
  const PAGE = 20;
  const PICTURES = 6;
  let limit = PAGE;

  /** Thumbnails of images that have a label in a head, as copies; `first` says which come first. */
  function images(head, label, first = () => false) {
    const found = [];
    headData.labels[head].forEach((one, place) => {
      if (one === label && thumbnailsByPlace.has(place)) found.push(place);
    });
    found.sort((a, b) => first(b) - first(a) || a - b);
    return make("div", { class: "pictures" }, ...found.slice(0, PICTURES).map((place) => copyOf(thumbnailsByPlace.get(place))));
  }

  function show() {
    const head = other.value;
    byId("other-title").textContent = `head ${head}`;
    const own = headData.labels[headData.shown];
    rows.replaceChildren(
      ...headData.clusters.slice(0, limit).map((k, place) => {
        const pairs = headData.matches[head][place].map(([match, share]) =>
          make("div", { class: "pair" }, make("b", {}, `cluster ${match}: ${share}%`), images(head, match, (i) => own[i] === k)),
        );
        const size = headData.sizes[place].toLocaleString("en-US");
        return make(
          "tr", {},
          make("th", { scope: "row" }, make("a", { href: `#cluster-${k}` }, `cluster ${k}`), make("br"), `${size} images`),
          make("td", {}, images(String(headData.shown), k)),
          make("td", {}, ...pairs),
        );
      }),
    );
    more.hidden = limit >= headData.clusters.length;
  }

  other.addEventListener("input", () => {
    limit = PAGE;
    show();
  });
  more.addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  show();
}
