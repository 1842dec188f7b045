"use strict";
const [runBox, taskBox, stageBox, verdictBox] = ["run", "task", "stage", "verdict"].map((id) => document.getElementById(id));
// Text only ever enters the page through textContent: an answer may contain markup.
function make(tag, text, parent) {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function line(table, label, answer) {
  const row = make("tr", "", table);
  make("td", label, row);
  make("td", answer.text || "(empty)", row);
  make("td", answer.held === undefined ? answer.verdict : answer.verdict + "; held to its form: " + answer.held, row);
}
function card(run, task, question, stage) {
  const node = make("div", ""), text = document.createElement("div");
  node.className = "answer";
  for (const uri of question.images) { const image = make("img", "", node); image.src = uri; image.alt = "the sample's image"; }
  node.append(text);
  make("pre", question.prompt, text);
  make("pre", "reference: " + question.references.join(" | "), text);
  const named = (k) => k + " " + run.stages[k], before = question.answers[task.learned], after = question.answers[stage];
  const table = make("table", "", text);
  if (before && task.learned !== stage) line(table, "when learned, " + named(task.learned), before);
  line(table, "after " + named(stage), after);
  const all = make("details", "", text);
  make("summary", "after every stage", all);
  const rest = make("table", "", all);
  for (const [k, answer] of Object.entries(question.answers)) line(rest, named(k), answer);
  return node;
}
function show() {
  const run = runs[runBox.selectedIndex], task = run.tasks[taskBox.value], stage = Number(stageBox.value);
  const asked = (task?.questions ?? []).filter((question) => question.answers[stage]);
  const wanted = asked.filter((question) => !verdictBox.value || question.answers[stage].verdict === verdictBox.value);
  document.getElementById("shown").textContent = wanted.length + " of " + asked.length;
  document.getElementById("answers").replaceChildren(...wanted.map((question) => card(run, task, question, stage)));
}
function chooseTask() {
  const run = runs[runBox.selectedIndex], kept = stageBox.value;
  const stages = new Set((run.tasks[taskBox.value]?.questions ?? []).flatMap((question) => Object.keys(question.answers)));
  stageBox.replaceChildren();
  for (const k of [...stages].sort((a, b) => b - a)) make("option", k + " " + run.stages[k], stageBox).value = k;
  if (stages.has(kept)) stageBox.value = kept;
  show();
}
function chooseRun() {
  taskBox.replaceChildren();
  for (const name of Object.keys(runs[runBox.selectedIndex].tasks)) make("option", name, taskBox);
  chooseTask();
}
for (const run of runs) make("option", run.name, runBox);
runBox.onchange = chooseRun;
taskBox.onchange = chooseTask;
stageBox.onchange = verdictBox.onchange = show;
chooseRun();
