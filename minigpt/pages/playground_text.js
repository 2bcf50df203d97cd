// In the box of the text: a click, or the arrow keys, choose a token.
const tokens = () => element.querySelectorAll("[data-i]");
const choose = token => {
  element.querySelector(".here")?.classList.remove("here");
  token.classList.add("here");
  token.scrollIntoView({ block: "nearest" });
  trigger("click", { place: Number(token.dataset.i) });
};
element.addEventListener("click", event => {
  const token = event.target.closest("[data-i]");
  if (token) choose(token);
});
element.addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const all = tokens();
  if (!by || !all.length) return;
  event.preventDefault();
  const here = element.querySelector(".here");
  const next = here ? Number(here.dataset.i) + by : by > 0 ? 0 : all.length - 1;
  choose(all[Math.max(0, Math.min(all.length - 1, next))]);
});
