// Shared by all parts of the page: finding and making elements, data, thumbnails, and the choice of colours.
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** The value in the script element of data with this id, or null. */
function dataOf(id) {
  const element = byId(id);
  return element ? JSON.parse(element.textContent) : null;
}

/** An element with attributes and children; children that are strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A copy of a thumbnail on the page, not in any tab order. */
function copyOf(thumbnail) {
  const copy = thumbnail.cloneNode(true);
  copy.removeAttribute("tabindex");
  return copy;
}

/** Thumbnails of the page by their place in the sheets: sheet * 256 + row * 16 + column. */
const thumbnailsByPlace = new Map();
for (const element of document.querySelectorAll("#gallery .t")) {
  const place = { s: 0, x: 0, y: 0 };
  for (const name of element.classList) {
    const match = /^([sxy])(\d+)$/.exec(name);
    if (match) place[match[1]] = Number(match[2]);
  }
  thumbnailsByPlace.set(place.s * 256 + place.y * 16 + place.x, element);
}

/** A number as a reader wants it. */
function shortNumber(value) {
  if (value === null || !Number.isFinite(value)) return "\u2013";
  const size = Math.abs(value);
  if (size >= 1e9 || (size < 1e-4 && size > 0)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

for (const element of document.querySelectorAll(".js-only")) element.hidden = false;

// --- Light and dark: as the system, or as the reader wants it; remembered where the browser allows.
{
  const button = byId("theme");
  const themes = ["", "light", "dark"];
  const names = { "": "as the system", light: "light", dark: "dark" };
  let theme = "";
  try {
    theme = localStorage.getItem("sela-report-theme") || "";
  } catch {
    // No storage, as in a sandbox: the choice lasts as long as the page.
  }
  const show = () => {
    if (!themes.includes(theme)) theme = "";
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = `Colours: ${names[theme]}`;
  };
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try {
      localStorage.setItem("sela-report-theme", theme);
    } catch {
      // As above.
    }
    show();
  });
  button.hidden = false;
  show();
}
