"use strict";
// Tables sort by their headers, and a button turns the page light or dark. Without this script the page is complete.

const PREFIX = { n: 1e-9, u: 1e-6, "µ": 1e-6, m: 1e-3, k: 1e3, K: 1e3, M: 1e6, G: 1e9, T: 1e12,
  Ki: 2 ** 10, Mi: 2 ** 20, Gi: 2 ** 30, Ti: 2 ** 40 };
const COUNT = { k: 2 ** 10, M: 2 ** 20 };  // 16k tokens: a letter alone counts in powers of 1024, as contexts do
const TIME = { min: 60, h: 3600 };

// The number that a cell starts with, its unit applied ("1.2 MiB", "4,096", "9.2x", "12.3 ms", "(+5 %)", "<= 3"), or null.
function number(text) {
  const found = /^(?:[<>]=?\s*)?\(?([+\-\u2212]?(?:\d[\d,]*)?\.?\d+(?:e[+-]?\d+)?)\s*([A-Za-zµ]*)/i.exec(text);
  if (!found) return null;
  const value = Number(found[1].replaceAll(",", "").replace("\u2212", "-"));
  const unit = /^(Ki|Mi|Gi|Ti|[numkKMGTµ])?(B|s|FLOPs?|b|bit)$/.exec(found[2]);
  const factor = unit ? (unit[1] ? PREFIX[unit[1]] : 1) : COUNT[found[2]] ?? TIME[found[2]] ?? 1;
  return value * factor;
}

function sort(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => {
    const text = row.cells[column].textContent.trim();
    return { row, text, value: number(text) };
  });
  const known = rows.filter((one) => !/^(|-|none|not .*)$/.test(one.text));
  const numeric = 2 * known.filter((one) => one.value !== null).length > known.length;
  const unknown = (one) => (numeric ? one.value === null : !known.includes(one));
  const order = (a, b) => (numeric ? a.value - b.value : a.text.localeCompare(b.text, "en"));
  rows.sort((a, b) => unknown(a) - unknown(b) || (unknown(a) ? 0 : descending ? order(b, a) : order(a, b)));
  body.append(...rows.map((one) => one.row));
}

function click(event) {
  const header = event.currentTarget.parentElement;
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  sort(header.closest("table"), header.cellIndex, descending);
}

for (const header of document.querySelectorAll("table:not(.facts) thead th")) {
  if (header.closest("table").tBodies[0].rows.length < 2) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = header.textContent;
  button.title = "Sort";
  if (!header.textContent.trim()) button.setAttribute("aria-label", `Sort by column ${header.cellIndex + 1}`);
  button.addEventListener("click", click);
  header.replaceChildren(button);
}

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const shown = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
const name = () => {
  theme.textContent = shown() === "dark" ? "Light" : "Dark";
  theme.title = `Show this page ${theme.textContent.toLowerCase()}`;
};
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = shown() === "dark" ? "light" : "dark";
  name();
});
dark.addEventListener("change", name);
name();
theme.hidden = false;

addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
