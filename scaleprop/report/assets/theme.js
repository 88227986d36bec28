// Light, dark, or as the system has it; remembered where the browser lets a local file do so.
const startTheme = () => {
  const root = document.documentElement;
  root.classList.add("js");
  const choice = document.getElementById("theme");
  const apply = (theme) => {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
  };
  try {
    choice.value = localStorage.getItem("scaleprop-theme") ?? "";
  } catch { /* no storage: the system's theme */ }
  apply(choice.value);
  choice.addEventListener("change", () => {
    apply(choice.value);
    try {
      localStorage.setItem("scaleprop-theme", choice.value);
    } catch { /* it holds until the page is left */ }
  });
};
startTheme();
