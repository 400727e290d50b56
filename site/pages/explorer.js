// The policy explorer: EXPLORER (rows.js) as cards, filters and an operating curve. No server, no library.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const SMALL = 24; // px of the full image: below it half resolution is hard to read (curation_tables.LEGIBLE_AT_HALF)
const PAGE = 24; // cards at a time
const CHOICES = {
  result: {"": "any", right: "right", wrong: "wrong", lost: "wrong, full is right", won: "right, half is wrong"},
  kind: {"": "any", when: "when", where: "where", reading: "reading"},
  evidence: {"": "any size", small: `small, up to ${SMALL} px`, large: `larger than ${SMALL} px`},
  decision: {"": "any", call: "calls", direct: "answers directly", turned: "turned by the bias"},
};
const get = (id) => document.getElementById(id);
let shownCards = PAGE;

function element(tag, attributes = {}, ...children) {
  const made = attributes.svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (name !== "svg") made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const isPolicy = (system) => system !== "full" && system !== "half";
const bias = () => EXPLORER.biases[Number(get("bias").value)];
const calls = (row, system, at) => row[system].gap + at > 0;

// What a system did with a row at a call bias
function answerOf(row, system, at) {
  if (!isPolicy(system)) return row[system];
  return calls(row, system, at) ? row[system].call : row[system].direct;
}

function kindOf(row, answer) {
  if (answer.score >= 0.5) return "correct";
  if (row.label === "HR" && !answer.crops.length) return "when";
  return row.label === "HR" && !answer.seen ? "where" : "reading";
}

// Means over tasks, and the share of rows with crops
function totals(rows, system, at) {
  const tasks = new Map();
  let called = 0;
  for (const row of rows) {
    const answer = answerOf(row, system, at);
    const sum = tasks.get(row.task) || {score: 0, rtr: 0, n: 0};
    sum.score += answer.score;
    sum.rtr += answer.tokens / answer.of;
    sum.n += 1;
    tasks.set(row.task, sum);
    called += answer.crops.length > 0;
  }
  const mean = (part) => [...tasks.values()].reduce((all, one) => all + one[part] / one.n, 0) / tasks.size;
  return {accuracy: 100 * mean("score"), rtr: mean("rtr"), calls: (100 * called) / rows.length};
}

function chosen() {
  const [policy, at] = [get("policy").value, bias()];
  const [task, result, kind, evidence, decision] = ["task", "result", "kind", "evidence", "decision"].map((id) => get(id).value);
  const words = get("words").value.toLowerCase();
  return EXPLORER.rows.filter((row) => {
    const answer = answerOf(row, policy, at);
    const found = kindOf(row, answer);
    const small = row.evidence !== null && row.evidence <= SMALL;
    const call = answer.crops.length > 0;
    const results = {right: found === "correct", wrong: found !== "correct"};
    results.lost = results.wrong && row.full.score >= 0.5;
    results.won = results.right && row.half.score < 0.5;
    const decisions = {call, direct: !call, turned: calls(row, policy, at) !== calls(row, policy, EXPLORER.call_bias)};
    return (!task || row.task === task) && (!result || results[result]) && (!kind || found === kind)
      && (!evidence || (evidence === "small") === small) && (!decision || decisions[decision])
      && row.question.toLowerCase().includes(words);
  });
}

function fillTable(table, rows) {
  const body = element("tbody");
  for (const [system, name] of Object.entries(EXPLORER.systems)) {
    const sums = rows.length ? totals(rows, system, bias()) : null;
    const cells = sums ? [sums.accuracy.toFixed(1), sums.rtr.toFixed(3), isPolicy(system) ? sums.calls.toFixed(1) : "–"] : ["–", "–", "–"];
    const line = element("tr", {"data-system": system}, element("th", {scope: "row"}, name));
    if (sums) line.dataset.exact = JSON.stringify(sums);
    line.append(...cells.map((text) => element("td", {}, text)));
    body.append(line);
  }
  const heads = ["system", "accuracy (%)", "RTR", "calls (%)"].map((text) => element("th", {scope: "col"}, text));
  table.replaceChildren(table.caption, element("thead", {}, element("tr", {}, ...heads)), body);
}

function drawCurve() {
  const point = (one) => [40 + 260 * one.rtr, 160 - 1.5 * (one.accuracy - low) * (100 / (100 - low))];
  const policies = Object.keys(EXPLORER.systems).filter(isPolicy);
  const curves = policies.map((system) => EXPLORER.biases.map((at) => totals(EXPLORER.rows, system, at)));
  const ends = ["full", "half"].map((system) => [EXPLORER.systems[system], totals(EXPLORER.rows, system, 0)]);
  const worst = Math.min(...curves.flat().map((one) => one.accuracy), ...ends.map(([, one]) => one.accuracy));
  const low = 10 * Math.floor(worst / 10);
  const svg = get("curve");
  svg.replaceChildren();
  const text = (x, y, words, anchor = "middle") => svg.append(element("text", {svg: 1, x, y, "text-anchor": anchor}, words));
  for (const accuracy of [low, (low + 100) / 2, 100]) {
    const [, y] = point({rtr: 0, accuracy});
    svg.append(element("line", {svg: 1, x1: 40, x2: 300, y1: y, y2: y, class: "grid"}));
    text(34, y + 4, accuracy, "end");
  }
  for (const rtr of [0, 0.5, 1]) text(40 + 260 * rtr, 174, rtr);
  text(170, 188, "RTR (accuracy in % over retained tokens)");
  policies.forEach((system, place) => {
    svg.append(element("polyline", {svg: 1, class: `curve curve-${place}`, points: curves[place].map((one) => point(one).join()).join(" ")}));
    const [x, y] = point(totals(EXPLORER.rows, system, bias()));
    const current = system === get("policy").value;
    svg.append(element("circle", {svg: 1, cx: x, cy: y, r: current ? 5 : 3, class: `curve-${place}`}));
    text(296, 130 + 14 * place, `${place ? "– –" : "—"} ${EXPLORER.systems[system]}`, "end");
  });
  for (const [name, one] of ends) {
    const [x, y] = point(one);
    svg.append(element("rect", {svg: 1, x: x - 3, y: y - 3, width: 6, height: 6, class: "end"}));
    text(x, y + 15, name.split(" ")[0]);
  }
  svg.setAttribute("aria-label", "Accuracy over retained token ratio for every recorded call bias; the circles mark the present one");
}

function pictureOf(row, answer) {
  const [width, height] = row.size;
  const marks = element("svg", {svg: 1, viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": "true"});
  const box = ([x1, y1, x2, y2], look) => marks.append(element("rect", {svg: 1, x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: look}));
  for (const name of answer.crops) box(EXPLORER.crops[name] ? EXPLORER.crops[name].map((edge) => 1000 * edge) : name.split(",").map(Number), "crop");
  row.question_boxes.forEach((one) => box(one, "question"));
  row.answer_boxes.forEach((one) => box(one, "answer"));
  const view = element("div", {class: "view", style: `aspect-ratio: ${width} / ${height}; max-width: ${1.6 * width}px`});
  if (row.view) view.append(element("img", {src: `data:image/webp;base64,${row.view}`, alt: `Half-resolution view, ${width} by ${height} px`}));
  view.append(marks);
  return view;
}

function cardOf(row) {
  const [policy, at] = [get("policy").value, bias()];
  const answer = answerOf(row, policy, at);
  const card = element("article", {class: "card", id: row.id}, pictureOf(row, answer));
  const size = row.evidence === null ? "no box" : `evidence ${row.evidence} px high`;
  card.append(element("p", {class: "question"}, row.question), element("p", {class: "facts"}, `truth: ${row.answers[0]} · ${EXPLORER.tasks[row.task]} · ${size}`));
  const lines = Object.entries(EXPLORER.systems).map(([system, name]) => {
    const one = answerOf(row, system, at);
    const right = one.score >= 0.5;
    const mark = right ? "✓" : system === policy ? `✗ ${kindOf(row, one)}` : "✗";
    const cells = [name, one.answer, mark, `${one.tokens} of ${one.of}`].map((text) => element("td", {}, text));
    return element("tr", {class: right ? "right" : "wrong"}, ...cells);
  });
  const heads = ["", "answer", "", "tokens"].map((text) => element("th", {}, text));
  card.append(element("table", {class: "answers"}, element("tr", {}, ...heads), ...lines));
  const turns = answer.turns.map(([role, text, tokens]) => {
    const words = text || `${answer.crops.join(", ")} at full resolution`;
    return element("p", {}, element("b", {}, role), ` ${words}${tokens ? ` (${tokens} visual tokens)` : ""}`);
  });
  const first = element("p", {}, element("b", {}, "user"), ` ${row.question} (${row.half.tokens} visual tokens)`);
  const gap = row[policy].gap;
  const chance = 1 / (1 + Math.exp(-(gap + at)));
  const facts = element("p", {class: "facts"}, `call against the best other first token: ${chance.toFixed(3)} (gap ${gap.toFixed(2)}, bias ${at})`);
  card.append(element("details", {class: "code"}, element("summary", {}, `${answer.turns.length + 1} turns of ${EXPLORER.systems[policy]}`), first, ...turns, facts));
  return card;
}

function update(paging) {
  if (!paging) shownCards = PAGE;
  const rows = chosen();
  get("bias-value").textContent = `${bias() > 0 ? "+" : ""}${bias()}${bias() ? "" : " (as trained)"}`;
  fillTable(get("summary"), EXPLORER.rows);
  get("selected").caption.textContent = `${rows.length} of ${EXPLORER.rows.length} rows selected`;
  fillTable(get("selected"), rows);
  drawCurve();
  get("cards").replaceChildren(...rows.slice(0, shownCards).map(cardOf));
  get("more").hidden = rows.length <= shownCards;
  const state = new URLSearchParams();
  for (const id of ["policy", "task", "words", ...Object.keys(CHOICES)]) if (get(id).value) state.set(id, get(id).value);
  state.set("bias", bias());
  history.replaceState(null, "", `#${state}`);
}

function start() {
  const policies = Object.entries(EXPLORER.systems).filter(([system]) => isPolicy(system)).reverse();
  const lists = {...CHOICES, policy: Object.fromEntries(policies), task: {"": "all tasks", ...EXPLORER.tasks}};
  for (const [id, options] of Object.entries(lists)) {
    get(id).append(...Object.entries(options).map(([value, words]) => element("option", {value}, words)));
  }
  const wanted = new URLSearchParams(location.hash.slice(1));
  const reset = (state) => {
    for (const id of [...Object.keys(lists), "words"]) get(id).value = state.get(id) || (id === "policy" ? policies[0][0] : "");
    const place = EXPLORER.biases.indexOf(Number(state.get("bias") ?? EXPLORER.call_bias));
    get("bias").value = place < 0 ? EXPLORER.biases.indexOf(EXPLORER.call_bias) : place;
    update();
  };
  get("bias").max = EXPLORER.biases.length - 1;
  for (const id of [...Object.keys(lists), "words", "bias"]) get(id).addEventListener("input", () => update());
  get("reset").addEventListener("click", () => reset(new URLSearchParams()));
  get("more").addEventListener("click", () => { shownCards += PAGE; update(true); });
  reset(wanted);
}

start();
