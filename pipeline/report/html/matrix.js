(() => {
  const SVG = "http://www.w3.org/2000/svg", TOP = 20, PANELS = 4;
  const fold = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const make = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  // Names of one family differ at their ends.
  const cut = (text, most) => {
    if (text.length <= most) return text;
    const end = Math.floor((most - 1) / 2);
    return `${text.slice(0, most - 1 - end)}…${text.slice(-end)}`;
  };
  const read = (id) => JSON.parse(document.getElementById(id)?.textContent || "null");

  // rows, columns: names; cells: [row, column, value]; told: what a cell means; options: diagonal, text.
  const draw = (place, { rows, columns, cells, told, wrong, text, label }) => {
    const readout = Object.assign(document.createElement("p"), { className: "readout" });
    readout.setAttribute("aria-live", "polite");
    const holder = Object.assign(document.createElement("div"), { className: "matrix" });
    place.replaceChildren(holder, readout);
    if (!rows.length || !columns.length) { readout.textContent = "no class of that name"; return; }
    const longest = (names, most) => Math.min(most, Math.max(...names.map((name) => name.length)));
    const size = Math.max(15, Math.min(34, Math.floor(420 / Math.max(rows.length, columns.length))));
    const left = 12 + 6.3 * longest(rows, 22), high = 14 + 5.2 * longest(columns, 18);
    const width = left + size * columns.length + 44, height = high + size * rows.length + 4;
    const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": label });
    svg.append(make("rect", { class: "back", x: left, y: high, width: size * columns.length, height: size * rows.length }));
    columns.forEach((name, k) => {
      const x = left + size * (k + 0.5) + 3;
      const one = make("text", { class: "name", x, y: high - 6, transform: `rotate(-50 ${x} ${high - 6})` }, cut(name, 18));
      one.append(make("title", {}, name));
      svg.append(one);
    });
    rows.forEach((name, k) => {
      const one = make("text", { class: "name", x: left - 6, y: high + size * (k + 0.5) + 4, "text-anchor": "end" }, cut(name, 22));
      one.append(make("title", {}, name));
      svg.append(one);
    });
    const values = new Map();
    for (const [row, column, value, share] of cells) {
      values.set(`${row} ${column}`, value);
      const kind = wrong && row !== column ? "cell wrong" : "cell";
      const attributes = { class: kind, x: left + size * column + 0.5, y: high + size * row + 0.5, width: size - 1, height: size - 1 };
      const cell = make("rect", { ...attributes, "fill-opacity": Math.min(1, 0.05 + 0.95 * (kind === "cell" ? share : Math.sqrt(share))).toFixed(3) });
      cell.append(make("title", {}, told(rows[row], columns[column], value)));
      svg.append(cell);
      if (size >= 24 && text(value)) {
        const deep = share > 0.6 && kind === "cell" ? " deep" : "";
        svg.append(make("text", { class: `cell${deep}`, x: left + size * (column + 0.5), y: high + size * (row + 0.5) + 3.5 }, text(value)));
      }
    }
    let at = null;
    const cursor = make("rect", { class: "cursor", width: size, height: size, visibility: "hidden" });
    svg.append(cursor);
    const move = (row, column) => {
      at = [Math.max(0, Math.min(rows.length - 1, row)), Math.max(0, Math.min(columns.length - 1, column))];
      cursor.setAttribute("x", left + size * at[1]);
      cursor.setAttribute("y", high + size * at[0]);
      cursor.setAttribute("visibility", "visible");
      readout.textContent = told(rows[at[0]], columns[at[1]], values.get(`${at[0]} ${at[1]}`));
    };
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      move((at ? at[0] : -step[0]) + step[0], (at ? at[1] : -step[1]) + step[1]);
    });
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = width / box.width;
      const column = Math.floor(((event.clientX - box.left) * scale - left) / size);
      const row = Math.floor(((event.clientY - box.top) * scale - high) / size);
      if (row >= 0 && row < rows.length && column >= 0 && column < columns.length) move(row, column);
    });
    holder.append(svg);
  };
  // The largest few of `weights` among those that the words allow, in their own order.
  const largest = (names, weights, words) => {
    const found = names.map((name, k) => k).filter((k) => !words.length || words.some((word) => fold(names[k]).includes(word)));
    return [found.slice().sort((a, b) => weights[b] - weights[a]).slice(0, TOP).sort((a, b) => a - b), found.length];
  };
  const wordsOf = (input) => fold(input?.value || "").split(",").map((part) => part.trim()).filter(Boolean);
  const percent = (value) => `${(100 * value).toFixed(1)} %`;

  const plans = read("data-transport");
  if (plans) {
    const place = document.getElementById("transport-plots"), tools = document.querySelector(".tools[data-for='transport']");
    const [teachers, classes] = tools.querySelectorAll("input"), output = tools.querySelector("output");
    const fill = () => {
      const asked = wordsOf(teachers), words = wordsOf(classes);
      const found = plans.plans.filter((one) => !asked.length || asked.some((word) => fold(one.teacher).includes(word)));
      const panels = found.slice(0, PANELS).map((one) => {
        const panel = document.createElement("figure"), caption = document.createElement("figcaption"), body = document.createElement("div");
        caption.textContent = one.teacher;
        if (one.chosen) caption.append(" ", Object.assign(document.createElement("span"), { className: "tag", textContent: "chosen" }));
        panel.className = "card";
        panel.append(caption, body);
        const top = plans.targets.map(() => 0);
        for (const [, column, share] of one.cells) top[column] = Math.max(top[column], share);
        const [columns, count] = largest(plans.targets, top, words);
        const inside = one.cells.filter(([, column]) => columns.includes(column));
        const weights = one.rows.map(() => 0);
        for (const [row, , share] of inside) weights[row] += share;
        const rows = weights.map((_, k) => k).filter((k) => weights[k] > 0 || (one.whole && one.rows.length <= TOP))
          .sort((a, b) => weights[b] - weights[a]).slice(0, TOP).sort((a, b) => a - b);
        const cells = inside.filter(([row]) => rows.includes(row))
          .map(([row, column, share]) => [rows.indexOf(row), columns.indexOf(column), share, share]);
        draw(body, {
          rows: rows.map((k) => one.rows[k]), columns: columns.map((k) => plans.targets[k]), cells,
          told: (row, column, value) => value === undefined
            ? `${column}: ${one.whole ? "nothing" : "next to nothing"} on ${row}` : `${percent(value)} of ${column} lies on ${row}`,
          text: (value) => (value >= 0.05 ? (100 * value).toFixed(0) : ""),
          label: `${one.teacher}: share of each class of the task that lies on each of its classes`,
        });
        if (count > columns.length || one.of > rows.length) {
          const note = document.createElement("p");
          note.className = "small soft";
          note.textContent = `${columns.length} of ${plans.targets.length} classes of the task, ${rows.length} of ${one.of} of the teacher`;
          panel.append(note);
        }
        return panel;
      });
      place.replaceChildren(...panels);
      output.textContent = `${panels.length} of ${plans.plans.length} teachers`;
    };
    for (const input of [teachers, classes]) input.addEventListener("input", fill);
    fill();
  }

  for (const holder of document.querySelectorAll("[data-confusion]")) {
    const one = read(holder.dataset.confusion), tools = document.querySelector(`.tools[data-for='${holder.id}']`);
    const input = tools.querySelector("input"), output = tools.querySelector("output");
    const fill = () => {
      const words = wordsOf(input);
      let [shown, count] = largest(one.classes, one.wrong, words);
      if (words.length && shown.length) {  // with those that they are taken for
        const found = new Set(shown), near = new Map();
        for (const [row, column, images] of one.cells) {
          for (const [own, other] of [[row, column], [column, row]]) {
            if (found.has(own) && !found.has(other)) near.set(other, (near.get(other) || 0) + images);
          }
        }
        const more = [...near].sort((a, b) => b[1] - a[1]).slice(0, TOP - shown.length).map(([k]) => k);
        shown = [...shown, ...more].sort((a, b) => a - b);
      }
      const names = shown.map((k) => one.classes[k]), seen = new Map(shown.map((k, place) => [k, place]));
      const cells = one.cells.filter(([row, column]) => seen.has(row) && seen.has(column))
        .map(([row, column, images]) => [seen.get(row), seen.get(column), images, images / Math.max(one.totals[row], 1)]);
      draw(holder, {
        rows: names, columns: names, cells, wrong: true,
        told: (row, column, value) => {
          const images = value === undefined ? (one.whole ? "no image" : "no or few images") : `${value} image${value === 1 ? "" : "s"}`;
          return row === column ? `${row}: ${images} right` : `${images} of ${row} taken for ${column}`;
        },
        text: (value) => String(value),
        label: "label by row, prediction by column",
      });
      output.textContent = words.length ? `${count} found` : `${shown.length} of ${count} classes`;
    };
    input.addEventListener("input", fill);
    fill();
  }
})();
