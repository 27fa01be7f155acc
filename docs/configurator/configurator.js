// The configurator: copier.yml's questions as a form that composes Copier's commands.
//
// Three parts: what Jinja's expressions mean in Python ($), how Copier asks (evaluate), and the page (show).
// docs/make_site.py adds the last lines: start() with the questions, transpiled from copier.yml, and the catalogue.
"use strict";

// ------------------------------------------------------------------------------------ Jinja's expressions, as in Python

class Unset extends Error {} // {{ UNSET }}: an answer is needed
const UNSET = Symbol("UNSET");
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // Python's
const catalogue = {};

const $ = {
  scope: (outer) => Object.create(outer),
  included: (name) => JSON.stringify(catalogue[name]), // JSON is YAML
  truth(value) {
    if (Array.isArray(value)) return value.length > 0;
    if (value && typeof value === "object") return Object.keys(value).length > 0;
    return Number.isNaN(value) || Boolean(value);
  },
  str(value) {
    if (value === UNSET) throw new Unset();
    if (value === undefined) return "";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (value === null) return "None";
    if (typeof value === "object") throw new TypeError("a list or a table as text");
    return String(value);
  },
  number(value) {
    if (typeof value !== "number") throw new TypeError(`${value} is not a number`);
    return value;
  },
  and: (left, right) => ($.truth(left) ? right() : left),
  or: (left, right) => ($.truth(left) ? left : right()),
  eq: (left, right) => left === right,
  ne: (left, right) => left !== right,
  lt: (left, right) => $.number(left) < $.number(right),
  gt: (left, right) => $.number(left) > $.number(right),
  lteq: (left, right) => $.number(left) <= $.number(right),
  gteq: (left, right) => $.number(left) >= $.number(right),
  in: (item, list) => list.includes(item),
  notin: (item, list) => !list.includes(item),
  add: (left, right) => (Array.isArray(left) ? [...left, ...right] : $.number(left) + $.number(right)),
  get(value, name) {
    if (value === undefined || value === null) throw new TypeError(`no ${name} of ${value}`);
    return Object.hasOwn(value, name) ? value[name] : undefined;
  },
  head: (value, end) => (typeof value === "string" ? [...value].slice(0, end).join("") : value.slice(0, end)),
  strip: (text) => text.replace(regex(`^[${SPACE}]+`), "").replace(regex(`[${SPACE}]+$`), ""),
  default: (value, other) => (value === undefined ? other : value),
  first: (list) => list[0],
  format(pattern, value) {
    const [, before, digits, after] = /^([^%]*)%\.(\d)f([^%]*)$/.exec(pattern);
    return before + $.number(value).toFixed(Number(digits)) + after;
  },
  from_yaml: (text) => JSON.parse(text), // of included() alone
  int: (value) => Math.trunc($.number(value)),
  length: (value) => (typeof value === "string" ? [...value].length : value.length),
  list: (value) => [...value],
  lower: (text) => text.toLowerCase(),
  map: (list, attribute) => list.map((item) => $.get(item, attribute)),
  min: (list) => Math.min(...list.map($.number)),
  regex_replace: (text, pattern, by) => text.replace(regex(pattern, "g"), () => by),
  regex_search: (text, pattern) => text.match(regex(pattern))?.[0] ?? null,
  rejectattr: (list, name) => list.filter((item) => !$.truth($.get(item, name))),
  replace: (text, old, by) => text.replaceAll(old, () => by),
  round: (value, digits) => (Number.isFinite(value) ? Number(value.toFixed(digits)) : value),
  selectattr(list, name, test, other) {
    if (test !== undefined && test !== "equalto") throw new TypeError(`unknown test ${test}`);
    return list.filter((item) => (test ? $.get(item, name) === other : $.truth($.get(item, name))));
  },
  to_json: (value) => JSON.stringify(value),
};

const regexes = new Map();

// Python's regular expression as JavaScript's: by code points, with Python's meaning of \Z $ . \s \d and (?i).
function regex(source, flags = "") {
  const key = `${flags}/${source}`;
  if (!regexes.has(key)) {
    const all = source.startsWith("(?i)") ? `${flags}iu` : `${flags}u`;
    let inClass = false;
    const text = source.replace(/^\(\?i\)/, "").replace(/\\.|[[\].$]/gs, (part) => {
      if (part === "[" && !inClass) inClass = true;
      else if (part === "]") inClass = false;
      else if (part === "\\s") return inClass ? SPACE : `[${SPACE}]`;
      else if (part === "\\d") return "\\p{Nd}";
      else if (part === "\\Z") return "$";
      else if (part === "$" && !inClass) return "(?=\\n?$)";
      else if (part === "." && !inClass) return "[^\\n]";
      else if (/^\\[wWbBDSA]$/.test(part)) throw new TypeError(`unknown in a pattern: ${part}`);
      return part;
    });
    regexes.set(key, new RegExp(text, all));
  }
  return regexes.get(key);
}

// ------------------------------------------------------------------------------------------------------- Copier's way

class Refused extends Error {}
let questions = [];

const render = (template, context) => (typeof template === "function" ? template(context) : template);

// Copier's cast_to_bool.
function toBool(value) {
  if (typeof value === "string") {
    const number = toNumber(value, true);
    if (number !== undefined) return number !== 0;
    const word = $.strip(value).toLowerCase();
    if (["y", "yes", "t", "true", "on"].includes(word)) return true;
    if (["", "n", "no", "f", "false", "off", "~", "null", "none"].includes(word)) return false;
  }
  return $.truth(value);
}

// Python's int() or float() of a text; undefined where it raises.
function toNumber(value, decimals) {
  if (typeof value === "number") return decimals ? value : Math.trunc(value);
  const text = $.strip(String(value)).toLowerCase();
  if (decimals && /^[+-]?(nan|inf|infinity)$/.test(text)) {
    return text.endsWith("nan") ? NaN : text.startsWith("-") ? -Infinity : Infinity;
  }
  const digits = "\\d+(_\\d+)*";
  const pattern = decimals ? `(${digits}(\\.(${digits})?)?|\\.${digits})(e[+-]?${digits})?` : digits;
  return new RegExp(`^[+-]?${pattern}$`).test(text) ? Number(text.replaceAll("_", "")) : undefined;
}

function cast(question, answer) {
  if (question.type === "bool") return toBool(answer);
  if (question.type === "json") return JSON.parse(answer);
  if (question.type === "str") return String(answer);
  const number = toNumber(answer, question.type === "float");
  if (number === undefined) throw new Refused("Invalid input");
  return number;
}

function choicesOf(question, context) {
  let choices = question.choices ?? [];
  if (typeof choices === "function") {
    const text = choices(context).trim(); // YAML: a list of JSON in one line, or one item a line
    const items = text.startsWith("[") ? JSON.parse(text) : text.split(/\n\s*/).map((line) => JSON.parse(line.slice(2)));
    choices = items.map((item) => (Array.isArray(item) ? [...item, ""] : [item, item, ""]));
  }
  return choices.map(([label, value, validator]) => ({
    label: render(label, context),
    value: render(value, context),
    disabled: render(validator, context),
  }));
}

function parsed(question, answer, choices) {
  const value = cast(question, answer);
  const choice = choices.find((choice) => choice.value === value);
  if (!choices.length || (choice && !choice.disabled)) return value;
  const listed = choices.filter((choice) => !choice.disabled).map((choice) => repr(choice.value));
  const reason = choice ? choice.disabled : `${repr(value)} is not in [${listed.join(", ")}]`;
  throw new Refused(`Invalid choice for '${question.name}': ${reason}`);
}

const repr = (text) => (text.includes("'") && !text.includes('"') ? `"${text}"` : `'${text.replaceAll("'", "\\'")}'`);

function validate(question, value, context) {
  const scope = Object.assign($.scope(context), { [question.name]: value });
  const sentence = $.strip(render(question.validator ?? "", scope));
  if (sentence) throw new Refused(`Validation error for question '${question.name}': ${sentence}`);
}

// Answer all questions as `copier copy --defaults` does, with `given` as its --data. Return each question's state, with
// the value, the default that it would have without an answer, and the sentence that Copier would end with.
// onShown drops answers to questions that a person would not meet with the other answers: what the form hides.
function evaluate(given, machine, onlyShown = false) {
  const context = Object.assign(Object.create(null), { UNSET, _folder_name: machine.folder });
  context._copier_conf = { os: machine.os };
  Object.assign(context, given);
  return questions.map((question) => {
    const { name } = question;
    const asked = () => toBool(render(question.ask ?? true, context));
    if (onlyShown && (!question.shown || (question.ask !== false && !asked()))) delete context[name];
    let when = toBool(render(question.when ?? true, context));
    if (onlyShown && !when) delete context[name];
    const answer = context[name];
    const choices = choicesOf(question, context);
    const state = { name, when, ask: asked(), choices, given: answer !== undefined, error: "" };
    state.help = render(question.help ?? "", context);
    delete context[name];
    try {
      state.default = parsed(question, render(question.default, context), choices);
      if (when && !question.secret) validate(question, state.default, context);
    } catch (error) {
      if (error instanceof Refused && !state.given) state.error = error.message;
      else if (!(error instanceof Refused || error instanceof Unset)) throw error;
      else if (!state.given && when) state.error = `Question "${name}" is required`;
    }
    state.value = state.default;
    if (state.given) {
      state.value = answer;
      try {
        state.value = parsed(question, answer, choices);
        validate(question, state.value, context);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        state.error = error.message;
        // what follows from other answers can only be computed from an answer that exists
        if (choices.length && !choices.some(({ value }) => value === state.value)) state.value = state.default;
      }
    }
    if (state.value !== undefined) context[name] = state.value;
    return state;
  });
}

// ------------------------------------------------------------------------------------------------------- The commands

const POSIX = {
  label: "sh, bash or zsh",
  continued: " \\\n  ",
  parts: /\//,
  // A word as the shell reads it back.
  word: (text) => (/^[\w@%+:,./-][\w@%+=:,./-]*$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`),
  // A path or an address: `~` means the home folder outside of quotes only.
  place: (text) => (text.startsWith("~/") ? `~/${text.length > 2 ? POSIX.word(text.slice(2)) : ""}` : POSIX.word(text)),
};
const POWERSHELL = {
  label: "PowerShell 7.3 or later",
  continued: " `\n  ",
  parts: /[\\/]/,
  // PowerShell takes typographic quotes for straight ones.
  word: (text) => (/^[\w+:./\\][\w+=:./\\-]*$/.test(text) ? text : `'${text.replace(/['\u2018-\u201b]/g, "$&$&")}'`),
  place: (text) => POWERSHELL.word(text),
};
const SHELLS = { posix: POSIX, powershell: POWERSHELL };
const LONGEST = 64; // a longer command takes a line for each answer

function command(shell, start, answers, places) {
  const options = answers.map(([name, value]) => `-d ${shell.word(`${name}=${value}`)}`);
  const lines = [start, ...options, places.map(shell.place).join(" ")].filter(Boolean);
  const line = lines.join(" ");
  return line.length <= LONGEST ? line : lines.join(shell.continued);
}

// ----------------------------------------------------------------------------------------------------------- The page

const OS = { Win: "windows", Mac: "macos" };
const PLACEHOLDER = "PATH-OR-URL-OF-THIS-REPOSITORY";
const COPY = "copier copy --trust --defaults";
const UPDATE = "copier update --trust --defaults";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// Set a text only when it differs: a screen reader reads what changes.
function write(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function show(root) {
  const os = OS[Object.keys(OS).find((name) => navigator.platform.startsWith(name))] ?? "linux";
  const answers = {}; // what the reader chose; all else follows its default
  const fields = new Map(questions.filter((question) => question.shown).map((question) => [question.name, field(question)]));
  const panel = commands(os);
  const form = element("form", { class: "cf-form", novalidate: true, onsubmit: (event) => event.preventDefault() });
  const sections = Map.groupBy(fields.values(), ({ question }) => question.section);
  for (const [title, members] of sections) {
    const heading = element("h2", {}, title);
    form.append(element("section", {}, heading, ...members.map(({ box }) => box)));
  }
  form.append(element("a", { class: "cf-jump", href: "#the-command" }, "The command"));
  root.replaceChildren(form, panel.box);
  root.addEventListener("focusout", () => update());
  update();

  function states() {
    return evaluate(answers, { os, folder: panel.folder() }, true);
  }

  function answered(name, raw) {
    answers[name] = raw;
    const state = states().find((state) => state.name === name);
    if (!fields.get(name).question.machine && !state.error && state.value === state.default) delete answers[name];
    update();
  }

  function update() {
    let all = states();
    const gone = ({ name, choices }) => name in answers && choices.length && !choices.some((c) => c.value === answers[name]);
    for (const { name } of all.filter(gone)) delete answers[name]; // a region that the other GPU is not in
    all = states();
    const shown = all.filter(({ name, when, ask }) => fields.has(name) && when && (ask || fields.get(name).fixed));
    for (const field of fields.values()) field.box.hidden = !shown.some(({ name }) => name === field.question.name);
    for (const state of shown) fields.get(state.name).update(state);
    for (const section of form.querySelectorAll("section")) section.hidden = [...section.children].slice(1).every((box) => box.hidden);
    const differ = shown.filter((s) => s.given && (fields.get(s.name).question.machine || s.value !== s.default));
    panel.update(
      differ.map(({ name, value }) => [name, String(value)]),
      shown.filter(({ error }) => error),
    );
  }

  // A question as a part of the form.
  function field(question) {
    const { name, type } = question;
    const id = `q-${name}`;
    const title = element("code", {}, name);
    const help = element("p", { class: "cf-help", id: `${id}-help` });
    const error = element("p", { class: "cf-error", id: `${id}-error`, "aria-live": "polite" });
    const note = element("span", { id: `${id}-note` });
    const reset = element("button", { type: "button", onclick: resetted }, "Use the default");
    const foot = element("p", { class: "cf-note" }, note, reset);
    const described = { "aria-describedby": `${help.id} ${note.id} ${error.id}` };
    let box, control, listed;
    if (type === "bool") {
      control = element("input", { type: "checkbox", id, ...described, onchange: () => answered(name, control.checked) });
      const label = element("label", { class: "cf-choice" }, control, title);
      box = element("div", { class: "cf-question" }, label, help, foot, error);
    } else if (Array.isArray(question.choices)) {
      control = element("div", { class: "cf-choices" });
      const attributes = { class: "cf-question", id, tabindex: -1, ...described };
      box = element("fieldset", attributes, element("legend", {}, title), help, control, foot, error);
    } else {
      const attributes = { id, ...described, oninput: () => answered(name, control.value) };
      if (question.choices) control = element("select", attributes);
      else if (takesLines(question)) control = element("textarea", { ...attributes, rows: 2 });
      else control = element("input", { ...attributes, type: "text", autocomplete: "off", spellcheck: "false" });
      if (type === "int") control.inputMode = "numeric";
      if (type === "float") control.inputMode = "decimal";
      if (question.placeholder) control.placeholder = question.placeholder;
      box = element("div", { class: "cf-question" }, element("label", { for: id }, title), help, control, foot, error);
    }

    function resetted() {
      delete answers[name];
      update();
      (control.matches("div") ? control.querySelector("input:checked") : control).focus();
    }

    function drawChoices(choices) {
      const signature = JSON.stringify(choices.map(({ value }) => value));
      if (signature !== listed && control.matches("select")) {
        control.replaceChildren(...choices.map(({ label, value }) => element("option", { value }, label)));
      } else if (signature !== listed) {
        const made = choices.map(({ value }) => {
          const attributes = { type: "radio", name: id, value, onchange: () => answered(name, value) };
          return element("label", { class: "cf-choice" }, element("input", attributes), element("span"));
        });
        control.replaceChildren(...made);
      }
      listed = signature;
    }

    function update_(state) {
      const { value, choices, given } = state;
      write(help, state.help.replace(/(?<=\w)\s*\n\s*(?=[A-Z])/, ". ").replace(/\s+/g, " ")); // wrapped for a terminal
      if (choices.length) drawChoices(choices);
      if (type === "bool") control.checked = value === true;
      else if (control.matches("div")) {
        choices.forEach(({ label, value: own, disabled }, index) => {
          const [radio, text] = control.children[index].children;
          radio.checked = own === value;
          radio.disabled = Boolean(disabled) && !radio.checked;
          const tag = own !== state.default ? "" : question.machine ? " (this machine)" : " (default)";
          write(text, disabled ? `${label} – ${disabled}` : `${label}${tag}`);
          control.children[index].classList.toggle("cf-off", Boolean(disabled));
        });
      } else if (document.activeElement !== control || control.matches("select")) {
        const text = value === undefined ? "" : String(value);
        if (control.value !== text) control.value = text;
      }
      const differs = given && (question.machine || value !== state.default);
      const plain = choices.find((choice) => choice.value === state.default)?.label ?? spoken(state.default);
      const said = control.matches("div") || !differs || state.default === undefined ? "" : `Default: ${plain}`;
      write(note, question.machine && !given ? "Not in the command: the machine that runs it decides" : said);
      reset.hidden = !differs || state.default === undefined;
      foot.hidden = !note.textContent && reset.hidden;
      write(error, sentence(state));
      box.classList.toggle("cf-wrong", Boolean(state.error));
      if (!control.matches("div")) control.setAttribute("aria-invalid", String(Boolean(state.error)));
    }

    return { question, box, update: update_, fixed: question.ask === false };
  }

  // The panel with the two commands, and what they need besides the answers.
  function commands(os) {
    const typed = (id, value) => {
      return element("input", { id, type: "text", value, autocomplete: "off", spellcheck: "false", oninput: () => update() });
    };
    const template = typed("cf-template", PLACEHOLDER);
    const folder = typed("cf-folder", "my-workspace");
    const radios = Object.entries(SHELLS).map(([key, { label }]) => {
      const checked = (os === "windows" ? "powershell" : "posix") === key;
      const input = element("input", { type: "radio", name: "cf-shell", value: key, checked, onchange: () => update() });
      return element("label", { class: "cf-choice" }, input, element("span", {}, label));
    });
    const missing = element("ul", { class: "cf-missing" });
    const status = element("p", { class: "cf-status", role: "status" });
    const [copy, copyButton, copyBox] = block("cf-copy", "Make a workspace");
    const [change, changeButton, changeBox] = block("cf-update", "Change one that you have");
    const box = element(
      "div",
      { class: "cf-commands" },
      element("h2", { id: "the-command" }, "The command"),
      element("label", { for: template.id }, "Address of this template"),
      template,
      element("label", { for: folder.id }, "Folder of the workspace"),
      folder,
      element("fieldset", {}, element("legend", {}, "Shell"), ...radios),
      missing,
      copyBox,
      changeBox,
      element("p", { class: "cf-help" }, "Run it in the workspace, with all changes committed. What is at its default here stays as it is there."),
      status,
    );

    function block(id, title) {
      const code = element("code", { id });
      const button = element("button", { type: "button", "aria-describedby": id, onclick: () => copied(code) }, "Copy");
      const head = element("div", { class: "cf-head" }, element("h3", {}, title), button);
      return [code, button, element("div", {}, head, element("pre", { tabindex: 0 }, code))];
    }

    function link(id, text) {
      const focus = (event) => {
        event.preventDefault();
        document.getElementById(id).focus();
      };
      return element("a", { href: `#${id}`, onclick: focus }, text);
    }

    async function copied(code) {
      try {
        await navigator.clipboard.writeText(code.textContent);
        write(status, "Copied.");
      } catch {
        getSelection().selectAllChildren(code);
        write(status, document.execCommand("copy") ? "Copied." : "Selected: copy it with the keyboard.");
      }
    }

    function shell() {
      return SHELLS[radios.map((label) => label.firstChild).find((input) => input.checked).value];
    }

    function name() {
      return folder.value.split(shell().parts).filter(Boolean).pop() ?? "";
    }

    function wrong() {
      const found = [];
      if (!template.value.trim() || template.value.startsWith("-")) found.push([template.id, "the template's address"]);
      if ([".", "..", "~", ""].includes(name()) || folder.value.startsWith("-")) found.push([folder.id, "the name of a folder"]);
      return found;
    }

    return {
      box,
      folder: name,
      update(given, refused) {
        const list = refused.map((state) => [`q-${state.name}`, `${state.name}: ${sentence(state)}`]);
        const places = wrong();
        const items = [...list, ...places.map(([id, what]) => [id, `type ${what}`])];
        if (missing.textContent !== items.map(([, text]) => text).join("")) {
          missing.replaceChildren(...items.map(([id, text]) => element("li", {}, link(id, text))));
        }
        write(copy, command(shell(), COPY, given, [template.value, folder.value]));
        write(change, command(shell(), UPDATE, given, []));
        copyButton.disabled = items.length > 0;
        changeButton.disabled = list.length > 0;
        write(status, "");
      },
    };
  }
}

// What stands beside a field: Copier's sentence without the name.
function sentence({ error }) {
  if (error.endsWith("is required")) return "an answer is needed";
  return error.replace(/^(Validation error for question|Invalid choice for) '\w+': /, "");
}

const spoken = (value) => (value === true ? "yes" : value === false ? "no" : value === "" ? "empty" : String(value));

// Whether an answer may have several lines, as far as the question's own validator says.
function takesLines(question) {
  if (question.type !== "str" || question.choices) return false;
  const context = Object.assign(Object.create(null), { [question.name]: "{a}\n{b}" });
  for (const { name, when, default: constant } of questions) {
    if (when === false && typeof constant === "string") context[name] = constant; // patterns
  }
  try {
    validate(question, "{a}\n{b}", context);
    return true;
  } catch {
    return false;
  }
}

// Called by what docs/make_site.py adds.
function start(all, included) {
  questions = all;
  Object.assign(catalogue, included);
  const root = document.getElementById("configurator");
  if (root) show(root);
}
