// The session explorer: the table shows the selected user and request.
"use strict";
(() => {
  const root = document.getElementById("explorer");
  const holder = document.getElementById("explorer-data");
  if (!root || !holder) return;
  const data = JSON.parse(holder.textContent);
  const users = document.getElementById("user");
  const buttons = document.getElementById("requests");
  const slate = data.users.map((user) => user.shown.map((rows) => rows.filter((row) => row.slot !== null).length));
  const minutes = (s) => (s < 60 ? `${s.toFixed(0)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`);
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  // Insert everything as text, never as markup.
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  const answer = (row) => {
    const cell = make("td", undefined, "text");
    if (row.slot === null) {
      cell.textContent = "not shown";
      return cell;
    }
    const timed = row.seconds !== null;
    if (timed) cell.append(make("span", `${row.seconds.toFixed(0)} s of ${row.duration.toFixed(0)} s `));
    for (const signal of row.signals) cell.append(make("span", signal.replaceAll("_", " "), "signal"));
    if (!timed) return cell;
    const bar = make("div", undefined, "watched");
    const part = make("i");
    part.style.width = `${Math.min(100, (100 * row.seconds) / Math.max(row.duration, 1))}%`;
    bar.append(part);
    cell.append(bar);
    return cell;
  };

  const show = (u, t) => {
    const user = data.users[u];
    const rows = user.shown[t];
    [...buttons.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === t)));
    const after = t + 1 < user.requests ? "then asked for more" : user.left ? "then left" : "then the log ends";
    const seconds = rows.reduce((sum, row) => sum + (row.slot === null ? 0 : row.seconds), 0);
    const watched = (s) => (user.seconds === null ? "" : `, ${minutes(s)} watched`);
    document.getElementById("session").textContent =
      `User ${user.user}: ${many(user.requests, "request")}, ${many(user.videos, "video")}${watched(user.seconds)} in the whole session. ` +
      `Request ${t + 1}: ${many(slate[u][t], "video")} shown${watched(seconds)}, ${after}.`;
    const body = document.querySelector("#candidates tbody");
    body.replaceChildren();
    for (const row of rows) {
      const line = make("tr", undefined, row.slot === null ? "rest" : "shown");
      const name = make("td", row.slot === null ? "–" : `${row.slot + 1}.`);
      name.append(make("small", `video ${row.video}`));
      line.append(name, answer(row));
      row.scores.forEach((score, i) => {
        const top = row.ranks[i] <= Math.max(slate[u][t], 1);
        const cell = make("td", score.toFixed(2).replace("-", "−"), top ? "score top" : "score");
        cell.append(make("small", `no. ${row.ranks[i]}`));
        line.append(cell);
      });
      body.append(line);
    }
  };

  const choose = (u) => {
    buttons.replaceChildren();
    data.users[u].shown.forEach((_, t) => {
      const button = make("button", String(t + 1));
      button.type = "button";
      button.setAttribute("aria-label", `request ${t + 1}`);
      button.addEventListener("click", () => show(u, t));
      buttons.append(button);
    });
    show(u, 0);
  };

  data.users.forEach((user, u) => {
    const length = user.seconds === null ? "" : `, ${minutes(user.seconds)}`;
    const option = make("option", `${user.user}: ${many(user.requests, "request")}${length}`);
    option.value = String(u);
    users.append(option);
  });
  users.addEventListener("change", () => choose(Number(users.value)));
  choose(0);
})();
