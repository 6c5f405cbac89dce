"use strict";
// Draws what the inert JSON holds. Text of a stranger only ever becomes textContent or an escaped plotly label.
(function () {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["sendDataToCloud", "lasso2d", "select2d"] };

  for (const [name, figure] of Object.entries(page.figures)) {
    const place = document.getElementById("figure-" + name);
    if (place && name !== "map") Plotly.newPlot(place, figure.data, figure.layout, options);
  }

  drawMap();
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  document.body.dataset.drawn = "yes"; // tests wait for this

  function drawMap() {
    const figure = page.figures.map;
    if (!figure) return;
    const place = document.getElementById("figure-map");
    const choice = document.getElementById("colour");
    const columns = page.atlas.columns;
    for (const name of Object.keys(columns)) {
      const option = document.createElement("option");
      option.value = name;
      option.textContent = name;
      choice.appendChild(option);
    }
    const points = figure.data[0];
    const draw = () => Plotly.react(place, tracesBy(columns[choice.value], points), figure.layout, options);
    Plotly.newPlot(place, tracesBy(columns[choice.value], points), figure.layout, options);
    choice.addEventListener("change", draw);
    place.on("plotly_hover", (event) => show(event.points[0].customdata));
  }

  function tracesBy(values, points) {
    if (!values) return [{ ...points, customdata: points.x.map((_, i) => i), hoverinfo: "none" }];
    const rows = new Map();
    values.forEach((value, i) => {
      const name = value === "" ? "unknown" : value;
      if (!rows.has(name)) rows.set(name, []);
      rows.get(name).push(i);
    });
    // One colour a value, in the order of the names; unknown is always grey.
    return [...rows.keys()].sort().map((name, k) => ({
      type: "scatter",
      mode: "markers",
      name: name,
      x: rows.get(name).map((i) => points.x[i]),
      y: rows.get(name).map((i) => points.y[i]),
      customdata: rows.get(name),
      hoverinfo: "name",
      marker: {
        size: 6,
        opacity: 0.8,
        color: name === "unknown" ? "#b8c0c8" : page.atlas.colours[k % page.atlas.colours.length],
        symbol: Math.floor(k / page.atlas.colours.length) % 8,
      },
    }));
  }

  function show(row) {
    const place = document.getElementById("shown");
    place.replaceChildren();
    const index = page.atlas.thumbnail[row];
    if (index !== null && index !== undefined && page.thumbnails[index]) {
      const image = document.createElement("img");
      image.src = page.thumbnails[index];
      image.alt = "thumbnail of image " + row;
      place.appendChild(image);
    }
    for (const [name, values] of Object.entries(page.atlas.columns)) {
      const line = document.createElement("p");
      line.textContent = name + ": " + unescaped(values[row] || "unknown");
      place.appendChild(line);
    }
  }

  function unescaped(text) {
    const names = { "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'", "&amp;": "&" };
    return text.replace(/&(lt|gt|quot|#x27|amp);/g, (found) => names[found]);
  }

  function makeSortable(table) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      head.addEventListener("click", () => {
        const body = table.tBodies[0];
        const down = head.dataset.order !== "down";
        head.dataset.order = down ? "down" : "up";
        const rows = [...body.rows].sort((a, b) => compare(key(a, column), key(b, column)));
        if (down) rows.reverse();
        rows.forEach((row) => body.appendChild(row));
      });
    });
  }

  function key(row, column) {
    const cell = row.cells[column];
    const text = cell.firstChild ? cell.firstChild.textContent.trim() : "";
    const number = parseFloat(text.replace(/,/g, ""));
    return Number.isNaN(number) ? text : number;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b));
  }
})();
