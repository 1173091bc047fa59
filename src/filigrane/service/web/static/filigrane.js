// Comforts on top of pages that work without it: where the focus goes after an answer, and moving
// between the passages of a marked text. It stores nothing and asks nobody.
"use strict";

// An answer has arrived: its headline is read out and takes the focus.
document.addEventListener("htmx:afterSwap", (event) => {
  const verdict = event.target.querySelector && event.target.querySelector("#verdict");
  if (verdict) {
    verdict.focus({ preventScroll: true });
    verdict.scrollIntoView({ block: "nearest" });
  }
});

// The service could not be asked at all: say so instead of doing nothing.
for (const name of ["htmx:sendError", "htmx:timeout"]) {
  document.addEventListener(name, () => {
    const result = document.getElementById("result");
    if (!result) return;
    const card = document.createElement("section");
    card.className = "card verdict problem";
    const sign = document.createElement("div");
    sign.className = "sign";
    sign.setAttribute("aria-hidden", "true");
    sign.textContent = "!";
    const words = document.createElement("div");
    const title = document.createElement("h2");
    title.id = "verdict";
    title.tabIndex = -1;
    title.textContent = "The service does not answer";
    const hint = document.createElement("p");
    hint.textContent = "Your text is still in the form. Check your connection and try again.";
    words.append(title, hint);
    card.append(sign, words);
    result.replaceChildren(card);
    title.focus();
  });
}

// In the text, n and p go to the next and the previous passage, and its row lights up with it.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const heat = event.target.closest && event.target.closest("#heat");
  if (!heat || (event.key !== "n" && event.key !== "p")) return;
  const numbers = [...heat.querySelectorAll("a.number")];
  if (!numbers.length) return;
  const here = numbers.indexOf(document.activeElement);
  const step = event.key === "n" ? 1 : -1;
  const next = here < 0 ? (step > 0 ? 0 : numbers.length - 1) : here + step;
  numbers[(next + numbers.length) % numbers.length].focus();
  event.preventDefault();
});

for (const [name, on] of [["focusin", true], ["focusout", false], ["mouseover", true], ["mouseout", false]]) {
  document.addEventListener(name, (event) => {
    const mark = event.target.closest && event.target.closest(".heat mark");
    if (!mark) return;
    const row = document.getElementById(mark.id.replace("passage-", "row-"));
    mark.classList.toggle("here", on);
    if (row) row.classList.toggle("here", on);
  });
}

// A file that was chosen counts instead of the text: show which of the two.
document.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  const form = event.target.form;
  const text = form && form.querySelector("textarea[name=text]");
  if (text) text.disabled = event.target.files.length > 0;
});
