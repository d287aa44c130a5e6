"use strict";
const numberOf = text => Number((/[-+]?[0-9.]+(e[-+]?[0-9]+)?/.exec(text.replaceAll(",", "")) ?? ["NaN"])[0]);
for (const header of document.querySelectorAll("th")) {
  header.classList.add("sortable");
  header.tabIndex = 0;
  header.addEventListener("click", () => {
    const body = header.closest("table").tBodies[0];
    const order = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
    const textOf = row => row.cells[header.cellIndex].textContent;
    const compare = (one, other) => {
      if (header.className.includes("text")) return order * textOf(one).localeCompare(textOf(other), "en", {numeric: true});
      const numbers = [numberOf(textOf(one)), numberOf(textOf(other))];
      const missing = numbers.map(Number.isNaN);
      return missing.includes(true) ? missing[0] - missing[1] : order * (numbers[0] - numbers[1]);
    };
    body.append(...[...body.rows].sort(compare));
  });
  header.addEventListener("keydown", event => {
    if (event.key === "Enter") header.click();
  });
}
const showHints = () => {
  for (const box of document.querySelectorAll("div.table")) box.classList.toggle("wide", box.scrollWidth > box.clientWidth);
};
addEventListener("resize", showHints);
showHints();
