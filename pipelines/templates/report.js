// Clicking a picture shows it large. The page reads as well without this.
document.documentElement.classList.add("js");
const dialog = document.createElement("dialog");
const large = document.createElement("img");
const text = document.createElement("p");
large.alt = "";
dialog.append(large, text);
dialog.addEventListener("click", () => dialog.close());
document.addEventListener("click", (event) => {
  const button = event.target.closest(".zoom");
  if (!button) return;
  const picture = button.querySelector("img");
  large.src = picture.src;
  large.alt = picture.alt;
  text.textContent = picture.alt;
  if (!dialog.isConnected) document.body.append(dialog);
  dialog.showModal();
});
