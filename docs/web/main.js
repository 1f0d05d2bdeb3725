// Runs the suite case by case and shows each as a row of the table. With `?report` the sums and the rows also go to the
// server that the page came from: that is how scripts/web-check reads them.
import init, { Suite } from "./pkg/pagewise_web.js";

const query = new URLSearchParams(location.search);
const sum = document.getElementById("sum");
const table = document.getElementById("cases");

function row({ outcome, worst, reason, case: line }) {
  const cells = [outcome, worst === undefined ? "" : worst.toFixed(3), reason ? `${line}: ${reason}` : line];
  const tr = table.insertRow();
  cells.forEach((text, i) => {
    const td = tr.insertCell();
    td.textContent = text;
    td.className = ["", "", "case"][i];
  });
  tr.cells[0].className = outcome;
}

async function run() {
  await init();
  const seed = query.has("seed") ? Number(query.get("seed")) : Math.floor(Math.random() * 1e9);
  const suite = await Suite.open(seed, query.has("all"));
  const adapter = suite.name();
  const counts = { passed: 0, failed: 0, skipped: 0 };
  const results = [];
  const total = suite.count();
  for (let i = 0; i < total; i++) {
    const result = JSON.parse(await suite.run(i));
    counts[result.outcome] += 1;
    results.push(result);
    row(result);
    const { passed, failed, skipped } = counts;
    sum.textContent = `${adapter}: ${passed} passed, ${failed} failed, ${skipped} skipped of ${total}`;
  }
  return { adapter, seed, ...counts, results };
}

const report = await run().catch((error) => ({ error: String(error) }));
if (report.error) sum.textContent = report.error;
if (query.has("report")) await fetch("report", { method: "POST", body: JSON.stringify(report) });
