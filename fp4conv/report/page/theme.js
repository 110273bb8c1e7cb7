// Light and dark: as the system has it, until the reader says otherwise.

const THEME_KEY = "fp4conv-theme";
const darkColours = byId("dark"); // a style sheet; its media query says when it holds
const systemDark = matchMedia(darkColours.media);

const isDark = () => matchMedia(darkColours.media).matches;

function setTheme(name) {
  darkColours.media = name === "dark" ? "all" : "not all";
}

/** Browsers may deny storage to files: then the choice lasts as long as the page. */
function stored(change) {
  try {
    return change(localStorage);
  } catch {
    return null;
  }
}

/** `redraw` is called after each change, since plots carry their colours in them. */
function startTheme(redraw) {
  const button = byId("theme");
  const name = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  };
  const chosen = stored((storage) => storage.getItem(THEME_KEY));
  if (chosen === "dark" || chosen === "light") setTheme(chosen);
  button.addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    setTheme(next);
    stored((storage) => storage.setItem(THEME_KEY, next));
    name();
    redraw();
  });
  systemDark.addEventListener("change", () => {
    name();
    redraw();
  });
  name();
}

/** Paper is light, and as wide as paper is: `redraw` is called before printing and after it. */
function startPrinting(redraw) {
  let before;
  window.addEventListener("beforeprint", () => {
    before = darkColours.media;
    setTheme("light");
    document.documentElement.dataset.paper = "";
    redraw();
  });
  window.addEventListener("afterprint", () => {
    delete document.documentElement.dataset.paper;
    darkColours.media = before;
    redraw();
  });
}

const onPaper = () => "paper" in document.documentElement.dataset;

/** The page's own colours, for plots. */
function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    text: colour("text"),
    muted: colour("muted"),
    line: colour("line"),
    surface: colour("surface"),
    accent: colour("accent"),
    soft: colour("accent-soft"),
    heat: [colour("heat-low"), colour("heat-middle"), colour("heat-high")],
    font: getComputedStyle(document.body).fontFamily,
  };
}
