// The feed: requests slates from the service, shows them, and sends the feedback.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SPEED = 10; // playback speed-up of a video
  const REACTIONS = ["like", "follow", "comment", "forward", "hate"];
  const say = (name) => name.replaceAll("_", " ");
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
  const time = (s) => (s < 60 ? `${Math.round(s)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`);
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  // All content is inserted as text, never as markup.
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const bar = (share) => {
    const box = make("span", undefined, "bar");
    const part = make("i");
    part.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
    box.append(part);
    return box;
  };
  // crypto.randomUUID exists only on https and on localhost.
  const eventId = () =>
    crypto.randomUUID ? crypto.randomUUID() : [...crypto.getRandomValues(new Uint32Array(4))].map((x) => x.toString(16)).join("-");

  // --- the service ---

  const askForToken = () =>
    new Promise((done) => {
      $("token-form").hidden = false;
      $("token").focus();
      $("token-form").onsubmit = (event) => {
        event.preventDefault();
        sessionStorage.setItem("token", $("token").value.trim());
        $("token-form").hidden = true;
        done();
      };
    });

  // Returns the response to a request; waits while the service is busy, and asks for the token if one is needed.
  const call = async (path, body) => {
    for (let busy = 0; ; ) {
      const headers = { "content-type": "application/json" };
      const token = sessionStorage.getItem("token");
      if (token) headers.authorization = `Bearer ${token}`;
      let response;
      try {
        response = await fetch(path, body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) });
      } catch {
        throw new Error("The service cannot be reached. Is it running? Press again to go on.");
      }
      if (response.status === 401) {
        if (token) problem("That is not the token of this service.");
        await askForToken();
        problem("");
      } else if (response.status === 202) {
        said(`Making ${(await response.json()).preparing}, which takes some seconds the first time …`);
        await pause(200);
      } else if ((response.status === 429 || response.status === 503) && busy++ < 5) {
        said("The service is busy; asking again …");
        await pause(1000);
      } else if (!response.ok) {
        const told = await response.json().catch(() => null);
        throw new Error(`${path}: ${told?.detail?.[0]?.msg ?? `status ${response.status}`}`);
      } else {
        return response.json();
      }
    }
  };

  const problem = (text) => {
    $("problem").textContent = text;
    $("problem").hidden = !text;
  };
  const said = (text) => {
    const place = $(visit ? "said" : "about");
    if (place.textContent !== text) place.textContent = text; // otherwise screen readers read it again
  };

  // --- a visit ---

  let about; // information about the service
  let visit; // the viewer, and the visit so far
  let turn; // the request on the screen

  const working = async (work) => {
    const buttons = [...document.querySelectorAll("#bar button, #begin")];
    buttons.forEach((button) => (button.disabled = true));
    problem("");
    try {
      await work();
    } catch (error) {
      problem(error.message);
    }
    buttons.forEach((button) => (button.disabled = false));
  };

  const begin = async () => {
    const simulated = $("who").elements.kind.value === "simulated";
    const begun = await call("/demo/visits", simulated ? { simulated: Number($("number").value) } : {});
    visit = { ...begun, videos: new Map(), done: [] };
    turn = null;
    learn(begun.turn.videos);
    $("answer").hidden = !simulated;
    await rank(begun.turn);
    $("about").textContent = described();
    $("start").hidden = true;
    $("session").hidden = false;
    $("status").focus();
  };

  const learn = (columns) =>
    columns.video.forEach((video, i) =>
      visit.videos.set(video, { tag: columns.tag[i], author: columns.author[i], duration: columns.duration[i] }),
    );

  const introduced = () => {
    if (visit.simulated === null) {
      const known = turn.position === 0 ? "nothing yet" : "what you did here";
      return `You are user ${visit.user} to the service, of whom it knows ${known}.`;
    }
    const seconds = new Map();
    for (const one of visit.history) {
      const tag = visit.videos.get(one.video)?.tag;
      if (tag !== undefined) seconds.set(tag, (seconds.get(tag) ?? 0) + (one.watch_time ?? 0));
    }
    const most = [...seconds].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([tag]) => tag);
    return (
      `Simulated user ${visit.simulated}, to the service user ${visit.user}, was shown ${many(visit.history.length, "video")} ` +
      `before and watched mostly ${topics(most)}.`
    );
  };
  const topics = (tags) => `topic${tags.length === 1 ? "" : "s"} ${tags.join(", ").replace(/, (\d+)$/, " and $1")}`;

  const rank = async (asked) => {
    const user = { id: visit.user };
    if (visit.profile) user.profile = visit.profile;
    if (asked.position === 0 && visit.history.length) user.history = visit.history;
    const ranked = await call("/rank", {
      user, context: asked.context, candidates: asked.candidates, scores: true, new_session: asked.position === 0,
    }); // prettier-ignore
    const before = turn;
    turn = { ...ranked, ...asked, places: places(ranked.scores), leaves: false, stepped: null, told: false, event: eventId() };
    $("person").textContent = introduced();
    turn.cards = ranked.slate.map(({ video }) => ({ video, ...visit.videos.get(video), seconds: 0, pressed: new Set() }));
    $("feed").replaceChildren(...turn.cards.map(card));
    changes(before);
    progress();
  };

  // {agent: Map from candidate to its rank, from 1, among the known candidates}
  const places = (scores) =>
    Object.fromEntries(
      Object.entries(scores).map(([agent, values]) => {
        const order = [...values.keys()].filter((i) => values[i] !== null).sort((a, b) => values[b] - values[a]);
        const at = new Map(order.map((i, place) => [i, place + 1]));
        return [agent, at];
      }),
    );

  const placeOf = (request, agent, video) => request.places[agent].get(request.candidates.indexOf(video));

  // Shows how each agent's ranking changed since the previous request.
  const changes = (before) => {
    $("changed").hidden = !before;
    if (!before) return;
    const ranked = (request, video) => placeOf(request, about.agents[0], video) !== undefined;
    const both = turn.candidates.filter((video) => ranked(turn, video) && ranked(before, video));
    // Each agent's order of the candidates common to both requests, and how far each candidate moved.
    const order = (request, agent) => {
      const sorted = [...both].sort((a, b) => placeOf(request, agent, a) - placeOf(request, agent, b));
      return new Map(sorted.map((video, place) => [video, place]));
    };
    const rows = about.agents.map((agent) => {
      const [was, is] = [order(before, agent), order(turn, agent)];
      const moves = both.map((video) => Math.abs(was.get(video) - is.get(video)));
      const first = (request) => request.candidates[[...request.places[agent].keys()][0]];
      return {
        agent,
        moved: both.length > 1 ? moves.reduce((a, b) => a + b, 0) / moves.length : null,
        first: [first(before), first(turn)].map((video) => visit.videos.get(video)?.tag),
      };
    });
    const liked = new Set(visit.done.flatMap((request) => request.liked));
    const of = (request) => request.cards.filter((one) => liked.has(one.tag)).length;
    const parts = [];
    if (liked.size) parts.push(`${of(turn)} of ${turn.cards.length} videos are of topics that got a reaction, ${of(before)} before`);
    const moved = rows.filter((row) => row.moved !== null).sort((a, b) => b.moved - a.moved);
    if (moved.length) parts.push(`the agent of ${say(moved[0].agent)} moved most, by ${moved[0].moved.toFixed(1)} places`);
    if (before.artifact !== turn.artifact) parts.push(`artefact ${before.artifact} was replaced by ${turn.artifact}`);
    $("changed").querySelector("summary span").textContent = `${parts.join("; ") || "all candidates are new"}.`;
    $("both").textContent =
      `Places moved: on average, in the order of the ${both.length} of ${turn.candidates.length} candidates that the request ` +
      `before had too.`; // prettier-ignore
    $("changed").querySelector("tbody").replaceChildren(
      ...rows.map((row) => {
        const line = make("tr");
        const same = row.first[0] === row.first[1];
        line.append(
          make("td", say(row.agent), "text"),
          make("td", row.moved === null ? "–" : row.moved.toFixed(1)),
          make("td", same ? `topic ${row.first[1]}, as before` : `topic ${row.first[1]}, before topic ${row.first[0]}`, "text"),
        );
        return line;
      }),
    );
  };

  const progress = () => {
    const now = turn.cards.reduce((sum, one) => sum + one.seconds, 0);
    const before = visit.done.reduce((sum, request) => sum + request.seconds, 0);
    $("status").textContent = `Request ${turn.position + 1} · ${time(before + now)} watched`;
    if (!turn.stepped) said(`Ranked by artefact ${turn.artifact}`);
  };

  // --- a card ---

  let playing; // {card, stop}

  // KuaiRand's rules for clicks and long views.
  const watched = ({ seconds, duration }) => ({
    click: duration <= 7 ? seconds >= duration : seconds > 7,
    long_view: seconds >= Math.min(duration, 18),
  });

  const card = (one, slot) => {
    const node = $("card").content.firstElementChild.cloneNode(true);
    const find = (what) => node.querySelector(what);
    node.setAttribute("aria-label", `${slot + 1}: topic ${one.tag}, creator ${one.author}, ${time(one.duration)}`);
    const tile = find(".tile");
    tile.classList.add(`pattern${one.tag % 7}`);
    tile.style.backgroundColor = `hsl(${(one.tag * 137.5) % 360} 48% 40%)`;
    find("h3").textContent = `${slot + 1} · topic ${one.tag}`;
    find(".length").textContent = clock(one.duration);
    const range = find("input");
    range.max = String(2 * one.duration);
    range.setAttribute("aria-label", "Seconds watched");
    const watch = (seconds) => {
      stop();
      one.seconds = seconds;
      one.show();
    };
    range.addEventListener("input", () => watch(Number(range.value)));
    find(".play").addEventListener("click", () => (playing?.card === one ? stop() : play(one)));
    find(".whole").addEventListener("click", () => watch(Math.max(one.seconds, one.duration)));
    const toggle = (button, name) => {
      button.dataset.signal = name;
      button.addEventListener("click", () => {
        if (!one.pressed.delete(name)) one.pressed.add(name);
        one.show();
      });
    };
    const creator = find(".creator");
    creator.textContent = `creator ${one.author}`;
    creator.title = "Open the creator's profile";
    toggle(creator, "profile_enter");
    find(".reactions").setAttribute("aria-label", "Reactions");
    for (const name of REACTIONS) {
      const button = make("button", name[0].toUpperCase() + name.slice(1));
      button.type = "button";
      toggle(button, name);
      find(".reactions").append(button);
    }
    const order = [about.agents[about.agents.length - 1], ...about.agents.slice(0, -1)];
    for (const [i, agent] of order.entries()) {
      const place = placeOf(turn, agent, one.video);
      const all = turn.places[agent].size;
      const line = make("li", undefined, `${i ? "" : "decides "}${place <= turn.cards.length ? "wanted" : ""}`);
      const score = turn.scores[agent][turn.candidates.indexOf(one.video)].toFixed(2);
      line.title = `Score ${score}, place ${place} of ${all} candidates for the agent of ${say(agent)}${i ? "" : ", which decides"}`;
      const label = i ? say(agent) : `${say(agent)} ${Number(score).toFixed(1)}`;
      line.append(make("span", label), bar(all > 1 ? 1 - Math.log(place) / Math.log(all) : 1), make("span", String(place), "place"));
      find(".agents").append(line);
    }
    find(".agents").setAttribute("aria-label", `Place among ${turn.places[about.agents[0]].size} candidates, by agent`);
    one.show = () => {
      const { click, long_view } = watched(one);
      range.value = String(one.seconds);
      range.setAttribute("aria-valuetext", `${time(one.seconds)} of ${time(one.duration)}`);
      const rules = [click && "click", long_view && "long view"].filter(Boolean).join(", ");
      find("output").replaceChildren(make("b", `${clock(one.seconds)} of ${clock(one.duration)}`), rules || (one.seconds ? "no click" : "not watched"));
      find(".played i").style.width = `${Math.min(100, (100 * one.seconds) / one.duration)}%`;
      const on = playing?.card === one;
      find(".play").textContent = on ? "Stop" : "Watch";
      find(".play").setAttribute("aria-pressed", String(on));
      const pressed = (button) => String(one.pressed.has(button.dataset.signal));
      node.querySelectorAll("[data-signal]").forEach((button) => button.setAttribute("aria-pressed", pressed(button)));
      progress();
    };
    one.show();
    return node;
  };

  const stop = () => {
    if (!playing) return;
    const { card: one, frame } = playing;
    cancelAnimationFrame(frame);
    playing = null;
    one.show();
  };

  const play = (one) => {
    stop();
    const start = one.seconds >= 2 * one.duration ? 0 : one.seconds;
    const end = start < one.duration ? one.duration : 2 * one.duration;
    const began = performance.now();
    playing = { card: one, frame: 0 };
    const tick = (now) => {
      one.seconds = Math.min(end, start + (SPEED * Math.max(0, now - began)) / 1000);
      if (one.seconds >= end) {
        stop();
        return;
      }
      playing.frame = requestAnimationFrame(tick);
      one.show();
    };
    playing.frame = requestAnimationFrame(tick);
    one.show();
  };

  // --- feedback on a slate ---

  const reacted = (one) => !one.pressed.has("hate") && (watched(one).long_view || one.pressed.size > 0);

  const step = async () => {
    turn.stepped ??= await call(`/demo/visits/${visit.user}/steps`, {
      position: turn.position,
      slate: turn.cards.map((one) => one.video),
      reacted: turn.cards.filter(reacted).map((one) => one.video),
    });
    learn(turn.stepped.turn.videos);
    return turn.stepped;
  };

  const tell = async (left) => {
    if (turn.told && !left) return;
    const videos = turn.cards.map((one) => {
      const signals = { video: one.video, watch_time: one.seconds };
      for (const [name, yes] of Object.entries(watched(one))) if (yes) signals[name] = 1;
      for (const name of one.pressed) signals[name] = 1;
      return signals;
    });
    // A repeated event counts once, and so does a signal that both events of a request contain.
    await call("/feedback", { event_id: turn.event + (left ? "-left" : ""), request_id: turn.request_id, videos, left });
    if (turn.told) return;
    turn.told = true;
    visit.done.push({
      seconds: turn.cards.reduce((sum, one) => sum + one.seconds, 0),
      videos: turn.cards.length,
      liked: turn.cards.filter(reacted).map((one) => one.tag),
      presses: turn.cards.flatMap((one) => [...one.pressed]),
    });
  };

  const answered = async () => {
    stop();
    const { answers, leaves } = await step();
    turn.leaves = leaves;
    turn.cards.forEach((one, i) => {
      one.seconds = answers[i].watch_time ?? 0;
      one.pressed = new Set(["profile_enter", ...REACTIONS].filter((name) => answers[i][name]));
      one.show();
    });
    $("next").textContent = leaves ? "The user leaves" : "Next slate";
    const [seconds, presses] = [turn.cards.reduce((sum, one) => sum + one.seconds, 0), turn.cards.flatMap((one) => [...one.pressed])];
    said(`User ${visit.simulated}: ${time(seconds)}, ${counted(presses)}, ${leaves ? "leaves" : "asks for more"}`);
  };

  const counted = (presses) => {
    const counts = new Map();
    for (const name of presses) counts.set(name, (counts.get(name) ?? 0) + 1);
    return [...counts].map(([name, n]) => many(n, say(name))).join(", ") || "no reaction";
  };

  const next = async () => {
    stop();
    if (turn.leaves) return leave();
    await tell(false);
    await rank((await step()).turn);
    $("status").focus({ preventScroll: true });
    window.scrollTo(0, $("session").offsetTop);
  };

  const leave = async () => {
    stop();
    await tell(true);
    const seconds = visit.done.map((request) => request.seconds);
    const total = seconds.reduce((a, b) => a + b, 0);
    const shown = visit.done.reduce((sum, request) => sum + request.videos, 0);
    $("end-title").textContent = visit.simulated === null ? "You left" : `User ${visit.simulated} left`;
    $("end-text").textContent =
      `${many(visit.done.length, "request")}, ${many(shown, "video")} shown, ${time(total)} watched, ` +
      `${counted(visit.done.flatMap((request) => request.presses))}. All of it is in the service's log.`;
    $("watched").replaceChildren(
      ...seconds.map((s, i) => {
        const line = make("li");
        line.append(make("span", `request ${i + 1}`), bar(s / Math.max(...seconds, 1)), make("span", time(s)));
        return line;
      }),
    );
    $("session").hidden = true;
    $("end").hidden = false;
    window.scrollTo(0, 0);
    $("end-title").focus();
  };

  // --- buttons ---

  const described = () =>
    `${many(about.slate, "video")} at a time, of ${many(about.candidates, "candidate")}, ranked by ` +
    `${about.agents.length === 1 ? about.method : `the ${about.agents.length} agents of ${about.method}`}.`;

  const choose = () => {
    const simulated = $("who").elements.kind.value === "simulated";
    $("number-label").hidden = $("another").hidden = !simulated;
    $("number").disabled = !simulated; // otherwise a hidden field could block the form
  };

  $("who").addEventListener("change", choose);
  $("another").addEventListener("click", () => ($("number").value = String(Math.floor(Math.random() * 1e6))));
  $("who").addEventListener("submit", (event) => {
    event.preventDefault();
    working(begin);
  });
  $("next").addEventListener("click", () => working(next));
  $("answer").addEventListener("click", () => working(answered));
  $("leave").addEventListener("click", () => working(leave));
  $("again").addEventListener("click", () => {
    visit = null;
    $("end").hidden = true;
    $("start").hidden = false;
    $("begin").focus();
  });

  working(async () => {
    choose();
    about = await call("/demo/about");
    $("about").textContent = described();
    const simulated = $("who").elements.kind[1];
    simulated.disabled = about.no_simulated !== null;
    if (about.no_simulated) $("simulated-note").textContent = `Not here: ${about.no_simulated}.`;
    $("recall-note").textContent =
      "Candidates of a visitor: half were asked about before and not shown, a quarter is of topics that were reacted to, " +
      "the others are drawn from the whole catalogue. " +
      (about.no_simulated
        ? ""
        : "Candidates of a simulated user are the world's own recall. What you press is logged as theirs, “Let the user " +
          "answer” presses what they would; their mood follows what they watch themselves, not what you press for them.");
  });
})();
