document.querySelectorAll("table.sortable th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
  const up = head.getAttribute("aria-sort") === "descending";
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => { const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent;
    const number = Number(text); return text !== "" && !Number.isNaN(number) ? number : text; };
  const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = value(a), y = value(b);
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return up ? order : -order; });
  table.tBodies[0].append(...rows);
}));
