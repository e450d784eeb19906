// The atlas of features. data.js calls nothing: it sets window.ATLAS, one array per column. features/N.js calls window.feature(N, card).
"use strict";
(() => {
  const data = window.ATLAS;
  const columns = data.columns;
  const count = columns.feature.length;
  const place = new Map(columns.feature.map((feature, i) => [feature, i]));
  const VERDICTS = ["artifact", "style", "content", "mixed", "unknown"];
  const PAGE = 48; // tiles
  const WORST = 8; // families in a table before one asks for more
  const $ = (id) => document.getElementById(id);
  const [search, sort, show, reviewer, blind] = ["search", "sort", "show", "reviewer", "blind"].map($);

  // --- small helpers ---

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function draw(tag, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  const figure = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());
  const percent = (share) => (share === 0 ? "0 %" : share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);
  const number = (value) => value.toLocaleString("en-US");

  // --- choices: in this browser until they are exported ---

  const STORE = `k2-atlas:${data.tower}:${data.weights}`;
  let memory = "{}"; // where the browser keeps nothing
  function stored() {
    let text = memory;
    try { text = localStorage.getItem(STORE) || "{}"; } catch { /* private windows */ }
    const found = JSON.parse(text);
    return { reviewer: found.reviewer || "", choices: found.choices || {} };
  }
  const state = stored();
  function keep() {
    memory = JSON.stringify(state);
    try { localStorage.setItem(STORE, memory); } catch { /* private windows */ }
    const made = Object.keys(state.choices).length;
    $("export").textContent = made ? `Export ${made} choice${made > 1 ? "s" : ""}` : "Export choices";
    $("export").disabled = !made;
  }

  function choose(feature, change) {
    const before = state.choices[feature] || {};
    const i = place.get(feature);
    const after = { verdict: before.verdict, tag: before.tag ?? columns.tag[i], threshold: columns.threshold[i], ...change };
    if (change.verdict && change.verdict === before.verdict) delete state.choices[feature]; // pressed again: taken back
    else if (after.verdict) state.choices[feature] = after;
    keep();
  }

  function exportChoices() {
    if (!reviewer.value.trim()) {
      reviewer.focus();
      status("Give your name first: a sign-off is somebody's.", true);
      return;
    }
    const { model, tower, weights } = data;
    const content = { kind: "k2 sae choices", model, tower, weights, reviewer: reviewer.value.trim(), choices: state.choices };
    const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    const name = `${model}-${reviewer.value.trim()}`.replace(/[^\w.-]+/g, "-");
    make("a", { href: url, download: `${name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    status(`Exported as ${name}.json. Next: k2 sae review --model ${model} --choices ${name}.json`);
  }

  function status(text, bad = false) {
    $("status").textContent = text;
    $("status").classList.toggle("bad", bad);
  }

  // --- the list ---

  const hidden = (feature) => blind.checked && !state.choices[feature];
  const verdictOf = (i) => state.choices[columns.feature[i]]?.verdict || columns.verdict[i];
  const nameOf = (i) => {
    const feature = columns.feature[i];
    return hidden(feature) ? "" : state.choices[feature]?.tag || columns.tag[i] || columns.name[i];
  };
  const texts = columns.feature.map((feature, i) => `${columns.tag[i]} ${columns.name[i]} ${columns.kind[i]} ${columns.words[i]}`.toLowerCase());
  const by = (column, down = true) => (a, b) => {
    const [x, y] = [columns[column][a], columns[column][b]];
    return (down ? (y ?? -Infinity) - (x ?? -Infinity) : (x ?? Infinity) - (y ?? Infinity)) || columns.feature[a] - columns.feature[b];
  };
  const rank = (i) => (columns.verdict[i] ? VERDICTS.indexOf(columns.verdict[i]) : VERDICTS.length);
  const has = (column) => columns[column].some((value) => value !== null);
  const SORTS = {
    tags: ["tags first", (a, b) => rank(a) - rank(b) || by("auroc")(a, b)],
    ...(has("auroc") ? { auroc: ["answers most to damage", by("auroc")], style: ["least style above", by("style", false)] } : {}),
    rate: ["fires most often", by("rate")],
    rare: ["fires most rarely", by("rate", false)],
    largest: ["largest value", by("largest")],
    ...(has("match") ? { match: ["most stable", by("match")], unstable: ["least stable", by("match", false)] } : {}),
    feature: ["number", by("feature", false)],
  };
  const SHOWS = {
    alive: ["those that fire", (i) => columns.rate[i] > 0],
    all: ["all", () => true],
    proposals: ["proposals, unsigned", (i) => columns.verdict[i] && !columns.reviewers[i]],
    mine: ["my choices", (i) => columns.feature[i] in state.choices],
    open: ["without my choice", (i) => columns.rate[i] > 0 && !(columns.feature[i] in state.choices)],
    ...Object.fromEntries(VERDICTS.map((verdict) => [verdict, [verdict, (i) => verdictOf(i) === verdict]])),
    silent: ["those that never fire", (i) => columns.rate[i] === 0],
  };
  for (const [select, options] of [[sort, SORTS], [show, SHOWS]])
    for (const [value, [text]] of Object.entries(options)) select.append(make("option", { value }, text));

  let listed = [];
  let shown = 0;

  function list() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (i) => words.every((word) => {
      const bare = word.replace(/^#/, "");
      if (/^\d+$/.test(bare)) return String(columns.feature[i]) === bare;
      return (!hidden(columns.feature[i]) && texts[i].includes(word)) || verdictOf(i).startsWith(word) || (state.choices[columns.feature[i]]?.tag || "").toLowerCase().includes(word);
    });
    const numbered = words.length && words.every((word) => /^#?\d+$/.test(word));
    listed = [];
    for (let i = 0; i < count; i++) if ((numbered || SHOWS[show.value][1](i)) && (!words.length || matches(i))) listed.push(i);
    listed.sort(SORTS[sort.value][1]);
    status(listed.length ? `${number(listed.length)} of ${number(count)} features` : "No feature matches. Clear the search, or show all.");
    $("grid").replaceChildren();
    shown = 0;
    grow();
  }

  function grow() {
    $("grid").append(...listed.slice(shown, shown + PAGE).map(tile));
    shown = Math.min(listed.length, shown + PAGE);
    $("more").hidden = shown >= listed.length || !$("card").hidden;
  }

  function chip(i) {
    const mine = state.choices[columns.feature[i]]?.verdict;
    const verdict = hidden(columns.feature[i]) ? "" : mine || columns.verdict[i];
    if (!verdict) return null;
    const who = mine ? "my choice" : columns.reviewers[i] ? `signed by ${columns.reviewers[i].split(";").join(", ")}` : "proposed, not signed";
    return make("span", { class: `chip ${verdict}${mine ? " mine" : ""}`, title: who }, mine || columns.reviewers[i] ? verdict : `${verdict}?`);
  }

  function tile(i) {
    const feature = columns.feature[i];
    const cover = columns.cover[i] ? make("img", { src: `features/${feature}-cover.jpg`, alt: "", loading: "lazy", width: 276, height: 184 }) : make("div", { class: "blank" });
    const best = columns.auroc[i] === null || hidden(feature) ? null : make("span", {}, `${columns.kind[i]} ${columns.auroc[i].toFixed(2)}`);
    return make("a", { class: "tile", href: `#${feature}`, "data-feature": feature }, cover, make("div", { class: "text" },
      make("div", { class: "line" }, make("b", {}, `${feature}`), chip(i)),
      make("div", {}, nameOf(i) || make("span", { class: "soft" }, "no name yet")),
      make("div", { class: "line" }, make("span", {}, columns.rate[i] ? `fires on ${percent(columns.rate[i])}` : "never fires here"), best)));
  }

  new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting) && $("card").hidden) grow(); }, { rootMargin: "600px" }).observe($("more"));

  // --- one feature ---

  const loaded = new Map();
  const waiting = new Map();
  window.feature = (feature, card) => { loaded.set(feature, card); };
  function load(feature) {
    if (loaded.has(feature)) return Promise.resolve(loaded.get(feature));
    if (!waiting.has(feature)) waiting.set(feature, new Promise((resolve, reject) => {
      const script = make("script", { src: `features/${feature}.js` });
      script.onload = () => { script.remove(); resolve(loaded.get(feature)); };
      script.onerror = () => { script.remove(); waiting.delete(feature); reject(new Error(`features/${feature}.js is missing: make the atlas again, or copy the whole folder`)); };
      document.head.append(script);
    }));
    return waiting.get(feature);
  }

  function picture(source, size, box, wide) {
    const [x, y, w, h] = box;
    const scale = Math.min(1, wide / Math.max(w, h));
    const pic = make("span", { class: "pic", role: "img" });
    pic.style.width = `${w * scale}px`;
    pic.style.height = `${h * scale}px`;
    pic.style.backgroundImage = `url("${source}")`;
    pic.style.backgroundSize = `${size[0] * scale}px ${size[1] * scale}px`;
    pic.style.backgroundPosition = `${-x * scale}px ${-y * scale}px`;
    return pic;
  }

  const dialog = make("dialog", { "aria-label": "enlarged picture", onclick: () => dialog.close() });
  document.body.append(dialog);
  function enlarge(source, size, box, text) {
    const pic = picture(source, size, box, 1e9);
    const factor = Math.min(4, (innerWidth * 0.85) / box[2], (innerHeight * 0.7) / box[3]);
    for (const [name, value] of [["width", box[2]], ["height", box[3]]]) pic.style[name] = `${value * factor}px`;
    pic.style.backgroundSize = `${size[0] * factor}px ${size[1] * factor}px`;
    pic.style.backgroundPosition = `${-box[0] * factor}px ${-box[1] * factor}px`;
    dialog.replaceChildren(pic, make("p", {}, text));
    dialog.showModal();
  }

  const ROWS = {
    strongest: ["Strongest", "the best images of any feature look convincing; go on reading", ""],
    upper: ["Upper quarter", "of the images on which it fires", ""],
    middle: ["Middle", "of the images on which it fires", ""],
    lower: ["Lower quarter", "of the images on which it fires", ""],
    damaged: ["Damaged on purpose", "the pictures of the contrast set to which it answers most, with the kind of damage and its severity", ""],
    above: ["Just above the threshold", "with the verdict artifact these are removed: is every one of them damaged?", "over"],
    below: ["Just below the threshold", "these stay", "under"],
  };

  function item(feature, card, [uid, value, box]) {
    const source = `features/${feature}.jpg`;
    const text = `${uid}: ${figure(value)}`;
    const body = box ? make("button", { type: "button", "aria-label": `enlarge ${text}`, title: text, onclick: () => enlarge(source, card.sprite, box, text) }, picture(source, card.sprite, box, 112)) : make("span", {}, "no picture");
    return make("figure", { class: "item" }, body, make("figcaption", {}, make("b", {}, figure(value)), make("span", { class: "uid", title: uid }, uid.split("/").pop())));
  }

  function strips(feature, card) {
    const parts = [];
    for (const [name, [title, why, side]] of Object.entries(ROWS)) {
      const items = name === "damaged" && hidden(feature) ? [] : card.strips[name];
      if (!items.length && ["upper", "middle", "lower", "damaged"].includes(name)) continue;
      const empty = name === "below" && !card.below ? "This run holds only codes: values under the threshold are not known." : "None of these images.";
      parts.push(make("section", { class: `strip ${side}` }, make("h3", {}, title, name === "above" || name === "below" ? make("span", { class: "soft" }, ` ${figure(card.threshold)}`) : null),
        make("p", {}, why), items.length ? make("div", { class: "row" }, ...items.map((one) => item(feature, card, one))) : make("p", {}, empty)));
    }
    return parts;
  }

  function details(feature, card) {
    if (!card.details.length) return null;
    const source = `features/${feature}-detail.jpg`;
    const pairs = card.details.map(([uid, heat, crop]) => {
      const parts = [heat, crop].filter(Boolean).map((box) => picture(source, card.detail_sprite, box, box === crop ? 192 : 128));
      parts.forEach((part, i) => part.setAttribute("aria-label", `${parts.length > 1 && !i ? "where it fires in" : "pixels at native scale of"} ${uid}`));
      return make("div", { class: "pair", title: uid }, ...parts);
    });
    return make("section", { class: "strip" }, make("h3", {}, card.details[0][1] ? "Where it fires, and the pixels there" : "Pixels at native scale"),
      make("p", {}, card.details[0][1] ? "Orange: the feature's value at each place that the tower looks at; their mean is the value of the image. Beside it the strongest place, not resized." : "The middle of the image, not resized. This tower has no values at places."),
      make("div", { class: "pairs" }, ...pairs));
  }

  function axis(svg, left, right, bottom, low, high) {
    svg.append(draw("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    for (let i = 0; i <= 4; i++) svg.append(draw("text", { x: left + ((right - left) * i) / 4, y: bottom + 15, "text-anchor": i === 0 ? "start" : i === 4 ? "end" : "middle" }, figure(low + ((high - low) * i) / 4)));
  }

  function histogram(card) {
    const { low, high, counts } = card.histogram;
    const [left, right, top, bottom] = [4, 436, 18, 150];
    const svg = draw("svg", { viewBox: "0 0 440 172", role: "img", "aria-label": `histogram of the feature's values; threshold ${figure(card.threshold)}` });
    const names = ["images", "clean", "style", "damage"].filter((name) => counts[name]);
    const words = { images: "images of the run", clean: "clean", damage: "damaged", style: "deliberate style" };
    const bins = counts.images.length;
    // Root scale: most images lie at nothing, and the few beyond the threshold are what matters.
    const heights = names.map((name) => { const sum = counts[name].reduce((a, b) => a + b, 0); return counts[name].map((n) => Math.sqrt(n / Math.max(1, sum))); });
    const most = Math.max(...heights.flat(), 1e-9);
    const x = (value) => left + ((right - left) * (value - low)) / (high - low);
    names.forEach((name, k) => {
      let path = `M${left} ${bottom}`;
      heights[k].forEach((height, i) => { const y = bottom - ((bottom - top) * height) / most; path += `L${left + ((right - left) * i) / bins} ${y}L${left + ((right - left) * (i + 1)) / bins} ${y}`; });
      svg.append(draw("path", { d: `${path}L${right} ${bottom}Z`, class: `area c-${name}` }));
    });
    for (const [value, kind] of [[card.fires, "fires"], [card.threshold, "mark"]]) if (value >= low && value <= high) svg.append(draw("line", { x1: x(value), x2: x(value), y1: top - 6, y2: bottom, class: kind }));
    const cut = x(card.threshold);
    svg.append(draw("text", { x: cut + (cut > 300 ? -5 : 5), y: 11, "text-anchor": cut > 300 ? "end" : "start" }, `threshold ${figure(card.threshold)}`));
    axis(svg, left, right, bottom, low, high);
    return make("section", { class: "panel" }, make("h3", {}, "How its values are spread"), svg,
      make("div", { class: "key" }, ...names.map((name) => make("span", {}, make("i", { class: `k-${name}` }), words[name]))),
      make("p", {}, "Each group by itself; heights are roots of shares. Dashed: where the SAE lets the feature fire."));
  }

  function dose(card) {
    const damage = card.families.filter((family) => family.role === "damage");
    if (!damage.length) return null;
    const clean = card.families.find((family) => family.role === "clean")?.share ?? 0;
    const kinds = new Map();
    for (const family of damage) {
      if (!kinds.has(family.name)) kinds.set(family.name, [[0, clean]]);
      kinds.get(family.name).push([family.severity, family.share]);
    }
    const ordered = [...kinds].map(([name, points]) => [name, points.sort((a, b) => a[0] - b[0])]).sort((a, b) => Math.max(...b[1].map((p) => p[1])) - Math.max(...a[1].map((p) => p[1])));
    const [left, right, top, bottom] = [30, 330, 8, 150];
    const svg = draw("svg", { viewBox: "0 0 440 172", role: "img", "aria-label": "share of damaged pictures above the threshold, by severity" });
    const most = Math.min(1, Math.max(0.1, Math.ceil(10 * Math.max(...damage.map((family) => family.share))) / 10));
    const y = (share) => bottom - ((bottom - top) * share) / most;
    const x = (severity) => left + ((right - left) * severity) / 5;
    for (const share of [0, most / 2, most]) svg.append(draw("line", { x1: left, x2: right, y1: y(share), y2: y(share), class: "axis" }), draw("text", { x: left - 4, y: y(share) + 4, "text-anchor": "end" }, `${Math.round(100 * share)}%`));
    for (let severity = 0; severity <= 5; severity++) svg.append(draw("text", { x: x(severity), y: bottom + 15, "text-anchor": "middle" }, severity || "clean"));
    const taken = [];
    [...ordered.entries()].reverse().forEach(([i, [name, points]]) => {
      const strong = i < 4 && points.some((point) => point[1] > 0.02);
      svg.append(draw("polyline", { points: points.map(([s, share]) => `${x(s)},${y(share)}`).join(" "), class: `curve ${strong ? `s${i}` : "faint"}` }));
      if (!strong) return;
      let at = y(points.at(-1)[1]) + 4;
      while (taken.some((other) => Math.abs(other - at) < 12)) at -= 12;
      taken.push(at);
      svg.append(draw("text", { x: right + 6, y: at, class: `t${i}` }, name.replaceAll("_", " ")));
    });
    return make("section", { class: "panel" }, make("h3", {}, "Dose"), svg, make("p", {}, "Share of damaged pictures above the threshold, by severity, on pictures that took no part in any choice."));
  }

  function harmless(card) {
    const rows = card.families.filter((family) => family.role !== "damage").sort((a, b) => b.share - a.share || b.upper - a.upper);
    if (!rows.length) return null;
    const shownRows = (some) => some.map((family) => make("tr", {}, make("td", {}, family.name.replaceAll("_", " ")), make("td", { class: "soft" }, family.role),
      make("td", { class: "num" }, percent(family.share)), make("td", { class: "num" }, percent(family.upper)), make("td", { class: "num" }, number(family.num))));
    const head = ["picture", "", "above", "at most", "pictures"].map((text, i) => make("th", { class: i > 1 ? "num" : "" }, text));
    return make("section", { class: "panel" }, make("h3", {}, "What must stay"), make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...shownRows(rows.slice(0, WORST)))),
      rows.length > WORST ? make("details", {}, make("summary", {}, `${rows.length - WORST} more`), make("table", {}, make("tbody", {}, ...shownRows(rows.slice(WORST))))) : null,
      make("p", {}, "Style and controls above the threshold; “at most” is the 95 % upper bound."));
  }

  function evidence(card) {
    const found = card.evidence;
    const roles = new Map(card.families.map((family) => [family.name, family.role]));
    const lines = [];
    for (const name of found.names || []) lines.push(make("tr", {}, make("td", {}, typeof name === "string" ? name : name.name), make("td", { class: "num" }, typeof name === "string" ? "proposed name" : [name.by, name.score ?? name.cosine].filter((part) => part !== undefined && part !== null).map((part) => (typeof part === "number" ? figure(part) : part)).join(" "))));
    for (const [name, value] of Object.entries(found.auroc || {}).filter(([, value]) => typeof value === "number").sort((a, b) => b[1] - a[1]).slice(0, 6)) lines.push(make("tr", {}, make("td", {}, `AUROC ${name.replaceAll("_", " ")}`, make("span", { class: "soft" }, roles.has(name) ? ` ${roles.get(name)}` : "")), make("td", { class: "num" }, figure(value))));
    for (const name of ["p", "selectivity", "stability"]) if (typeof found[name] === "number") lines.push(make("tr", {}, make("td", {}, name), make("td", { class: "num" }, figure(found[name]))));
    if (card.match) lines.push(make("tr", {}, make("td", {}, `most alike in ${data.other}: feature ${card.match.feature}`), make("td", { class: "num" }, `correlation ${figure(card.match.correlation)}`)));
    return lines.length ? make("section", { class: "panel" }, make("h3", {}, "Evidence"), make("table", {}, make("tbody", {}, ...lines))) : null;
  }

  function verdicts(i) {
    const feature = columns.feature[i];
    const mine = state.choices[feature] || {};
    const buttons = VERDICTS.map((verdict, k) => make("button", { type: "button", "aria-pressed": mine.verdict === verdict, "data-verdict": verdict, onclick: () => { choose(feature, { verdict }); open(feature); } }, verdict, make("kbd", {}, k + 1)));
    const name = make("input", { type: "text", "aria-label": "name of what it shows", placeholder: "what it shows", value: hidden(feature) ? "" : mine.tag ?? (columns.tag[i] || columns.name[i]), spellcheck: "false" });
    name.addEventListener("input", () => { if (state.choices[feature]) choose(feature, { tag: name.value }); });
    const row = hidden(feature) || !columns.verdict[i] ? "Nobody has said anything yet." : columns.reviewers[i] ? `Signed as ${columns.verdict[i]} by ${columns.reviewers[i].split(";").join(", ")}.` : `Proposed as ${columns.verdict[i]}; it removes nothing until somebody signs it.`;
    return make("div", { class: "say", role: "group", "aria-label": "verdict" }, ...buttons, name, make("small", {}, row));
  }

  let current = null;

  function step(by) {
    const at = listed.indexOf(place.get(current)) + by;
    if (at >= 0 && at < listed.length) location.hash = `#${columns.feature[listed[at]]}`;
  }

  function open(feature) {
    const i = place.get(feature);
    if (i === undefined) return;
    const fresh = current !== feature;
    current = feature;
    const at = listed.indexOf(i);
    load(feature).then((card) => {
      if (current !== feature) return;
      const walk = make("div", { class: "walk" }, make("button", { type: "button", onclick: back }, "All features"),
        make("button", { type: "button", disabled: at <= 0 && "", onclick: () => step(-1), "aria-label": "previous feature" }, "←"),
        make("button", { type: "button", disabled: (at < 0 || at === listed.length - 1) && "", onclick: () => step(1), "aria-label": "next feature" }, "→"));
      const fact = (value, text) => make("li", {}, make("b", {}, value), ` ${text}`);
      const near = card.near.map(([other, cosine]) => { const one = tile(place.get(other)); one.querySelector(".text").replaceChildren(make("b", {}, `${other} `), nameOf(place.get(other)), make("div", { class: "soft" }, `cosine ${cosine.toFixed(2)}`)); return one; });
      $("card").replaceChildren(
        make("div", { class: "head" }, make("h2", {}, `${feature}`, make("span", { class: "soft" }, nameOf(i) ? ` · ${nameOf(i)}` : "")), walk),
        make("ul", { class: "facts" }, fact(percent(card.rate), "of the images"), fact(`${number(card.above)} of ${number(card.num)}`, "above the threshold"), fact(figure(card.threshold), "threshold"), fact(figure(card.largest), "largest value")),
        verdicts(i), ...strips(feature, card), details(feature, card) ?? "",
        make("div", { class: "charts" }, histogram(card), ...[dose(card), hidden(feature) ? null : evidence(card), harmless(card)].filter(Boolean)),
        make("section", {}, make("h3", {}, "Nearest features"), make("div", { class: "near" }, ...near)));
      for (const id of ["grid", "more"]) $(id).hidden = true;
      $("card").hidden = false;
      status(at < 0 ? "" : `${number(at + 1)} of ${number(listed.length)}`);
      document.title = `${feature} ${nameOf(i)} · ${data.model}`;
      if (fresh) scrollTo(0, 0);
      if (listed[at + 1] !== undefined) load(columns.feature[listed[at + 1]]).catch(() => {}); // the next one is ready when asked for
    }).catch((error) => { status(error.message, true); });
  }

  let scrolled = 0;
  function back() { location.hash = ""; }
  function route() {
    const asked = Number(location.hash.slice(1));
    if (location.hash.length > 1 && place.has(asked)) {
      if ($("card").hidden) scrolled = scrollY;
      open(asked);
      return;
    }
    const before = current;
    current = null;
    $("card").hidden = true;
    $("grid").hidden = false;
    document.title = `${data.model}: atlas of features`;
    if (before !== null) {
      for (const old of $("grid").querySelectorAll(`[data-feature="${before}"]`)) old.replaceWith(tile(place.get(before)));
      status(`${number(listed.length)} of ${number(count)} features`);
    }
    $("more").hidden = shown >= listed.length;
    scrollTo(0, scrolled);
  }

  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    if (event.target.closest("input:not([type=checkbox]), select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    if (current === null) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    if (event.key === "Escape") back();
    const verdict = VERDICTS[Number(event.key) - 1];
    if (verdict) { choose(current, { verdict }); open(current); }
  });
  const relist = () => { if (current !== null) { history.replaceState(null, "", "#"); route(); } scrolled = 0; list(); };
  for (const control of [search, sort, show, blind]) control.addEventListener("input", relist);
  reviewer.value = state.reviewer;
  reviewer.addEventListener("input", () => { state.reviewer = reviewer.value; keep(); });
  $("export").addEventListener("click", exportChoices);
  keep();
  list();
  route();
})();
