"use strict";

const PRINTED_WIDTH = 700; // pixels between the margins of A4 and of Letter
const CONFIG = { responsive: true, displayModeBar: false };
const shown = new Map();

function themed(layout, isPrinted) {
  const style = getComputedStyle(document.body);
  const isDark = !isPrinted && matchMedia("(prefers-color-scheme: dark)").matches;
  const color = isPrinted ? "#000000" : style.color;
  const grid = isDark ? "#2b323b" : "#e6e9ee";
  const line = isDark ? "#58616d" : "#9aa3ae";
  const themedLayout = { ...layout, font: { ...layout.font, color, family: "system-ui, sans-serif" } };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(key)) {
      themedLayout[key] = { gridcolor: grid, linecolor: line, tickcolor: line, ...layout[key] };
    }
  }
  themedLayout.hoverlabel = { ...layout.hoverlabel, bgcolor: isDark ? "#262d35" : "#ffffff", font: { color } };
  if (isPrinted) {
    themedLayout.width = PRINTED_WIDTH;
  }
  return themedLayout;
}

function draw(id, isPrinted = false) {
  const { figures, number } = shown.get(id);
  const { data, layout } = figures[number];
  return Plotly.react(id, data, themed(layout, isPrinted), CONFIG);
}

for (const plot of document.querySelectorAll(".plot")) {
  shown.set(plot.id, { figures: JSON.parse(document.getElementById(`${plot.id}-data`).textContent), number: 0 });
}
const drawn = Promise.all([...shown.keys()].map((id) => draw(id)));
drawn.then(() => { document.documentElement.dataset.drawn = "true"; });

for (const select of document.querySelectorAll("select[data-figure]")) {
  select.addEventListener("change", () => {
    shown.get(select.dataset.figure).number = Number(select.value);
    draw(select.dataset.figure);
  });
}

function drawAll(isPrinted) {
  for (const id of shown.keys()) {
    draw(id, isPrinted);
  }
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(false));
addEventListener("beforeprint", () => drawAll(true));
addEventListener("afterprint", () => drawAll(false));

function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") {
    return one - other;
  }
  return String(one).localeCompare(String(other), undefined, { numeric: true });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  for (const [column, heading] of headings.entries()) {
    heading.querySelector("button").addEventListener("click", () => {
      const isDescending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((one) => one.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const filled = rows.filter((row) => value(row, column) !== "");
      const empty = rows.filter((row) => value(row, column) === "");
      filled.sort((one, other) => compare(value(one, column), value(other, column)) * (isDescending ? -1 : 1));
      table.tBodies[0].append(...filled, ...empty);
    });
  }
}
