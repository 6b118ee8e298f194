package main

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func TestBrowserComposer(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	d.setUp("alice")
	d.addUser("bob")
	d.addUser("李雷")
	alice := startBrowser(t, "alice", "zh-CN")
	alice.signIn(d, "lab")
	alice.waitOnline()
	var said []string
	expectText := func(want string) {
		t.Helper()
		if got := alice.value("#text"); got != want {
			t.Fatalf("the composer has %.99q, want %.99q", got, want)
		}
		alice.expectNow(said...)
	}
	clear := func() { t.Helper(); alice.press("#text", selectAll+backspace) }
	sends := func(keys, text string) {
		t.Helper()
		alice.press("#text", keys)
		said = append(said, "alice: "+text)
		alice.expect(said...)
		expectText("")
	}

	// The Enter that ends a composition belongs to the input method. Browsers report it as key 229 or as Enter.
	alice.script(`window.keys = []; addEventListener("keydown", e => keys.push([e.key, e.keyCode, e.isComposing].join(" ")), true)`)
	for _, code := range []int{229, 13} {
		alice.click("#text")
		alice.devtools("Input.imeSetComposition", anything{"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
		alice.devtools("Input.dispatchKeyEvent", anything{"type": "rawKeyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": code})
		expectText("nihao")
		alice.paste("你好")
		alice.devtools("Input.dispatchKeyEvent", anything{"type": "keyUp", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13})
		expectText("你好")
		alice.settle() // the page still takes an Enter for the input method's
		sends(enterKey, "你好")
	}
	if got, want := alice.script(`return keys.join()`), "Enter 229 true,Enter 13 false,Enter 13 true,Enter 13 false"; got != want {
		t.Errorf("the page got the keys %s, want %s", got, want)
	}
	// Each of the signs is enough by itself. The last is Safari's, which ends the composition before that Enter.
	alice.paste("再见")
	alice.script(`const text = document.getElementById("text");
		const enter = how => text.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...how }));
		enter({ keyCode: 229 });
		enter({ keyCode: 13, isComposing: true });
		for (const type of ["compositionstart", "compositionend"]) text.dispatchEvent(new CompositionEvent(type));
		enter({ keyCode: 13 });`)
	expectText("再见")
	sends(enterKey, "再见")

	alice.press("#text", "one"+shiftEnter+"two")
	expectText("one\ntwo")
	sends(enterKey, "one\ntwo")

	alice.press("#text", enterKey)
	expectText("")
	alice.press("#text", "   "+enterKey)
	alice.expectNow(said...)
	sends(strings.Repeat(backspace, 3)+"x"+enterKey, "x")

	// Whatever Enter does, Ctrl+Enter sends. Which of the two it is lasts.
	alice.click(".menu summary")
	alice.click(`//*[@id="switches"]/button[.="回车键换行"]`)
	alice.reload()
	alice.waitOnline()
	alice.press("#text", "a"+enterKey+"b")
	expectText("a\nb")
	sends(ctrlEnter, "a\nb")
	alice.click(".menu summary")
	alice.click(`//*[@id="switches"]/button[@aria-pressed="true"]`)

	// A counter comes before the limit, and a refusal at it, which costs no word.
	const counter = `document.getElementById("bytes").checkVisibility()`
	alice.paste(strings.Repeat("a", maxMessage*9/10))
	if alice.script(`return `+counter) == true {
		t.Error("the counter comes too early")
	}
	alice.press("#text", "a")
	alice.wait(counter + ` && document.getElementById("bytes").innerText.includes("8192")`)
	clear()
	alice.wait(`!` + counter)
	long := strings.Repeat("字", maxMessage/3+1)
	alice.paste(long)
	alice.press("#text", enterKey)
	expectText(long)
	alice.wait(`[...document.querySelectorAll("[role=alert]")].some(e => e.checkVisibility() && e.innerText.includes("8192"))`)
	long = strings.TrimSuffix(long, "字")
	sends(backspace+enterKey, long) // after Backspace it fits

	// What is long is folded. What is formatted is drawn as the server draws it.
	const last = `[...document.querySelectorAll("#messages li[data-id]")].at(-1)`
	const height = `return ` + last + `.querySelector(".body").clientHeight`
	folded := alice.script(height).(float64)
	alice.click("#messages li.folded .unfold")
	if unfolded := alice.script(height).(float64); unfolded < 1.5*folded {
		t.Errorf("a long message is %.0f pixels high, unfolded %.0f", folded, unfolded)
	}
	if alice.script(`return `+last+`.contains(document.activeElement)`) != true {
		t.Error("the focus is lost with the button")
	}
	alice.click("#text")
	alice.paste("**粗** _斜_ ~~删~~ `a*b*c` @bob @alice https://go.dev/(x)。\n> 引用\n> 两行\n```go\nx := 1\n\n  y\n```\n<b>&amp;</b>")
	alice.press("#text", enterKey)
	alice.wait(last + `.querySelector("pre")`)
	drawn := alice.script(`return ` + last + `.querySelector(".body").innerHTML`)
	alice.reload()
	alice.waitOnline()
	if got := alice.script(`return ` + last + `.querySelector(".body").innerHTML`); got != drawn {
		t.Errorf("the page drew\n%s\nthe server\n%s", drawn, got)
	}
	if got := alice.script(`return ["strong", "em", "del", "code", "a", "blockquote", "pre", ".mention:not(.me)", ".mention.me"]
		.filter(css => !` + last + `.querySelector(".body " + css)).join()`); got != "" {
		t.Errorf("%s are not drawn in %s", got, drawn)
	}

	testCompletion(t, alice)

	// Files that are text become part of the message, others are refused. What comes with a picture of itself is text.
	const transfer = `const data = new DataTransfer(), text = document.getElementById("text");
		for (const [type, words] of arguments[1]) if (type) data.items.add(words, type); else data.items.add(new File([words], "notes.txt"));
		const prevented = !text.dispatchEvent(arguments[0] === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }) :
			new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
		return prevented`
	clear()
	alice.script(transfer, "drop", [][]string{{"", "第一行\n"}})
	alice.wait(`document.getElementById("text").value === "第一行\n"`)
	alice.script(transfer, "paste", [][]string{{"", "line 2"}})
	alice.wait(`document.getElementById("text").value === "第一行\nline 2"`)
	alice.script(transfer, "paste", [][]string{{"", "\x00\x01"}})
	alice.wait(`document.getElementById("status").innerText.includes("notes.txt")`)
	if alice.script(transfer, "paste", [][]string{{"text/plain", "1\t2"}, {"", "\x00PNG"}}) == true {
		t.Error("text that has a picture with it cannot be pasted")
	}
	if got := alice.value("#text"); got != "第一行\nline 2" {
		t.Errorf("the files became %q", got)
	}
}

// testCompletion writes what opens the list above the composer, and what does not.
func testCompletion(t *testing.T, alice *browser) {
	expect := func(want string) {
		t.Helper()
		if got := alice.value("#text"); got != want {
			t.Errorf("the composer has %q, want %q", got, want)
		}
		alice.press("#text", selectAll+backspace)
	}
	// choices is what the list has, the chosen one in brackets. A combobox tells its reader.
	choices := func(want string) {
		t.Helper()
		alice.wait(`(() => { const text = document.getElementById("text"), box = document.getElementById("choices");
			const found = !box.checkVisibility() ? [] : [...box.children].map(li => { const words = li.lastChild.textContent.trim();
				return li.id === text.getAttribute("aria-activedescendant") && li.ariaSelected === "true" ? "[" + words + "]" : words; });
			return found.join(" ") === arguments[0] && text.ariaExpanded === String(found.length > 0); })()`, want)
	}
	typing := func(keys, list string) { t.Helper(); alice.press("#text", keys); choices(list) }

	typing("大家@b", "[bob]")
	typing(tabKey, "")
	expect("大家@bob ")
	typing("@b", "[bob]")
	typing(tabKey, "")
	typing(undoKeys, "")
	expect("@b")
	typing("(@", "[李雷] bob") // in the order of who reads Chinese
	typing(arrowDown, "李雷 [bob]")
	typing(arrowDown+arrowUp+enterKey, "")
	expect("(@bob ")
	typing("，@", "[李雷] bob")
	alice.click("#choices li:nth-child(2)")
	choices("")
	alice.press(":focus", "！") // which is still the composer
	expect("，@bob ！")
	typing("x @b", "[bob]")
	typing(escape, "")
	expect("x @b")
	typing("me@b", "")
	typing(" 10:30 :)", "")
	expect("me@b 10:30 :)")
	typing("x @b", "[bob]")
	typing(arrowLeft+arrowLeft+arrowLeft, "") // it is no longer about what is at the caret
	typing(shiftEnter, "")
	expect("x\n @b")

	typing("@", "[李雷] bob")
	alice.devtools("Input.imeSetComposition", anything{"text": "b", "selectionStart": 1, "selectionEnd": 1})
	alice.settle()
	choices("") // about half a syllable
	alice.paste("雷")
	choices("[李雷]")
	typing(enterKey, "")
	expect("@李雷 ")

	typing(":tad", "[:tada:]")
	typing(enterKey, "")
	expect("🎉")
	typing("好:庆", "[:庆祝:]")
	typing(tabKey, "")
	expect("好🎉")
	typing("so :tada: it :x", "")
	expect("so 🎉 it :x")
	alice.press("#text", "ab"+arrowLeft)
	alice.click("#emoji")
	alice.press("#picker button:focus", arrowRight+arrowRight+arrowLeft)
	alice.press("#picker button:focus", enterKey)
	alice.wait(`document.activeElement.id === "text"`)
	expect("a❤️b")
}

// rowWith is the message whose text has these words.
func rowWith(text string) string {
	return `//*[@id="messages"]/li[div[contains(@class, "body")][contains(., "` + text + `")]]`
}

// act chooses from the menu of the message that says text.
func (b *browser) act(text, label string) {
	b.t.Helper()
	b.click(rowWith(text) + `/button[contains(@class, "more")]`)
	b.click(`//*[@id="actions"]//button[.="` + label + `"]`)
}

func TestBrowserMessages(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	phone := d.setUp("alice")
	d.addUser("bob")
	alice, bob := startBrowser(t, "alice", "en"), startBrowser(t, "bob", "en")
	for _, b := range []*browser{alice, bob} {
		b.signIn(d, "lab")
		b.waitOnline()
	}
	// both waits on both screens for what is true of li, the first row with text.
	both := func(text, condition string, args ...any) {
		t.Helper()
		for _, b := range []*browser{alice, bob} {
			b.wait(`(li => li && (`+condition+`))([...document.querySelectorAll("#messages li[data-author]")].find(li =>
				li.querySelector(".body").innerText.includes(arguments[0])))`, append([]any{text}, args...)...)
		}
	}
	about := func(words, composer string) {
		t.Helper()
		bob.wait(`document.getElementById("about").innerText.replace(/\s+/g, " ").includes(arguments[0]) && document.getElementById("about").hidden === !arguments[0]
			&& document.getElementById("text").value === arguments[1]`, words, composer)
	}

	// Who writes is seen writing, until it is said.
	bob.press("#text", "draft")
	alice.wait(`document.getElementById("typing").innerText === "bob is typing…"`)
	bob.say(" one")
	alice.wait(`document.getElementById("typing").innerText === ""`)
	alice.expect("bob: draft one")

	// An answer quotes what it is to, and leads there and back.
	alice.say("question")
	alice.expect("bob: draft one", "alice: question")
	d.speak(phone, "lab", numbered(100, 40)...)
	both("139", `true`)
	bob.act("question", "Reply")
	about("Reply to alice: question", "")
	bob.press("#text", escape)
	about("", "")
	bob.act("question", "Reply")
	bob.say("answer")
	about("", "")
	const quote = `li.querySelector(".quote")?.innerText.replace(/\s+/g, " ")`
	both("answer", quote+` === "alice question"`)
	const seen = `(li => { const row = li.getBoundingClientRect(), list = document.getElementById("messages").getBoundingClientRect();
		return row.top >= list.top && row.bottom <= list.bottom && li.matches(".target"); })(document.evaluate(arguments[0], document).iterateNext())`
	alice.click(rowWith("answer") + `/a[@class="quote"]`)
	alice.wait(seen, rowWith("question"))
	alice.press("#back", enterKey)
	alice.wait(seen+` && document.getElementById("back").hidden && document.activeElement.matches(".quote")`, rowWith("answer"))

	// Its author changes it: the draft waits meanwhile, and whoever quotes it follows.
	bob.press("#text", "half a thought")
	bob.act("answer", "Edit")
	about("Editing", "answer")
	bob.press("#text", "!"+escape)
	about("", "half a thought")
	bob.press("#text", selectAll+backspace+arrowUp)
	about("Editing", "answer")
	alice.act("answer", "Reply")
	alice.reload() // both go on with what they were about
	if got := alice.text("#about"); !strings.HasPrefix(got, "Reply to bob:\nanswer") {
		t.Errorf("after a reload alice is about %q", got)
	}
	alice.waitOnline()
	alice.say("thanks")
	bob.press("#text", " **42**")
	bob.reload()
	about("Editing", "answer **42**")
	bob.waitOnline()
	bob.press("#text", enterKey)
	about("", "")
	both("answer 42", `li.querySelector("strong") && li.querySelector(".mark").innerText === "edited"`)
	both("thanks", quote+` === "bob answer **42**"`)
	alice.click(rowWith("answer 42") + `/span[@class="mark"]/a`)
	alice.wait(`[...document.querySelectorAll("#dialog[open] .trail .body")].map(e => e.innerText).join() === "answer,answer **42**"`)
	alice.press("#dialog button", escape)
	alice.wait(`!document.querySelector("dialog[open]") && document.activeElement.matches(".mark a")`)

	// Reactions add up, and a click takes back one's own.
	expectReactions := func(want string) {
		t.Helper()
		both("question", `[...li.querySelectorAll(".reaction")].map(e => e.innerText.replace(/\s+/g, " ") + " " + e.title).join("; ") === arguments[1] &&
			[...li.querySelectorAll(".reaction")].every(e => (e.ariaPressed === "true") === e.title.split(", ").includes(JSON.parse(document.body.dataset.client).username))`, want)
	}
	bob.act("question", "👍")
	expectReactions("👍 1 bob")
	alice.click(rowWith("question") + `//*[@data-emoji="👍"]`)
	expectReactions("👍 2 bob, alice")
	bob.click(rowWith("question") + `//*[@data-emoji="👍"]`)
	expectReactions("👍 1 alice")
	bob.press(rowWith("question")+`/button[contains(@class, "more")]`, enterKey)
	bob.press("#actions button:focus", arrowDown+arrowLeft+enterKey) // "…" comes before the first line
	bob.press("#picker button:focus", arrowDown+arrowUp+arrowRight)
	bob.press("#picker button:focus", enterKey)
	expectReactions("👍 1 alice; ❤️ 1 bob")
	bob.wait(`document.activeElement.matches(".more")`)

	// A link to a message leads to it.
	alice.act("question", "Copy link")
	alice.press("#text", pasteKeys)
	link := alice.value("#text")
	alice.press("#text", selectAll+backspace)
	alice.open(link)
	alice.waitOnline()
	alice.wait(seen, rowWith("question"))
	alice.click("#newer")

	// What is deleted, by a second click, is gone wherever it was quoted. Who is about to change it keeps the words.
	bob.press("#text", arrowUp)
	about("Editing", "answer **42**")
	alice.act("answer 42", "Delete")
	both("answer 42", `true`)
	alice.click(`//*[@id="actions"]//button[.="Really delete?"]`)
	both("thanks", quote+` === "bob This message was deleted."`)
	const gone = `[...document.querySelectorAll(".body, .quote")].every(e => !/answer|42|43/.test(e.innerText)) && !document.querySelector(".failed, .pending")`
	alice.wait(gone)
	bob.wait(gone)
	bob.say(", or 43")
	bob.wait(`document.querySelector(".failed [role=alert]")`)
	bob.click(`//div[@class="refused"]/button[.="Discard"]`)
	bob.wait(gone)
}

func TestBrowserOutbox(t *testing.T) {
	needBrowser(t)
	t.Parallel()
	d := startDaemon(t, t.TempDir(), "-rate", "0")
	phone := d.setUp("alice")
	d.post(phone, "/chat/side/", url.Values{"message": {"elsewhere"}, "cid": {"0"}})
	alice := startBrowser(t, "alice", "en")
	alice.signIn(d, "lab")
	alice.waitOnline()
	alice.say("before")
	alice.expect("alice: before")

	// A draft belongs to its room, whose name says so elsewhere.
	alice.press("#text", "half")
	alice.click(`#rooms a[href="/chat/side/"]`)
	alice.expect("alice: elsewhere")
	if got := alice.value("#text"); got != "" {
		t.Errorf("the draft of another room is here: %q", got)
	}
	alice.wait(`document.querySelector('#rooms a[href="/chat/lab/"] .draft').checkVisibility()`)
	alice.click(`#rooms a[href="/chat/lab/"]`)
	alice.wait(`document.getElementById("text")?.value === "half" && !document.querySelector(".draft:not([hidden])")`)
	alice.waitOnline()

	// What is written while the network is away is shown with a clock, and sent by the tab that comes after this one.
	alice.setNetwork(false)
	alice.wait(`document.body.dataset.state === "offline"`)
	alice.say(" a thought")
	alice.expect("alice: before", "alice: half a thought (pending)")
	alice.act("before", "Edit")
	alice.say(" and after")
	alice.expect("alice: before and after (pending)", "alice: half a thought (pending)")
	first := alice.tab()
	next := alice.newTab("")
	alice.lookAt(first)
	alice.do("DELETE", alice.session+"/window", nil, nil)
	alice.lookAt(next)
	alice.setNetwork(true)
	alice.open(d.url("/chat/lab/"))
	said := []string{"alice: before and after", "alice: half a thought"}
	alice.expect(said...)
	alice.wait(`document.querySelector("#messages .mark a")`) // edited
	alice.waitOnline()

	// A tick confirms for a moment what is on the disk.
	alice.script(`window.ticks = 0; new MutationObserver(() => { ticks += document.querySelectorAll(".sent .state").length; })
		.observe(document.getElementById("messages"), { subtree: true, childList: true })`)
	alice.say("ticked")
	said = append(said, "alice: ticked")
	alice.expect(said...)
	alice.wait(`ticks > 0 && !document.querySelector(".state")`)

	// Two tabs share what waits, and the log has it once.
	tabs := []string{next, alice.newTab(d.url("/chat/lab/"))}
	everywhere := func(do func(i int)) {
		t.Helper()
		for i, tab := range tabs {
			alice.lookAt(tab)
			do(i)
		}
	}
	alice.waitOnline()
	d.kill()
	everywhere(func(i int) {
		alice.wait(`document.body.dataset.state === "offline"`)
		said = append(said, fmt.Sprintf("alice: from tab %d", i))
		alice.say(said[len(said)-1][7:])
	})
	d.start()
	everywhere(func(int) { alice.waitOnline(); alice.expect(said...) })

	// A tab that goes away takes no draft of another one with it.
	alice.press("#text", "mine")
	alice.wait(`Object.values(localStorage).includes("mine")`)
	alice.lookAt(tabs[0])
	alice.reload()
	everywhere(func(int) {
		if got := alice.value("#text"); got != "mine" {
			t.Errorf("the draft is %q", got)
		}
		alice.press("#text", selectAll+backspace)
		alice.waitOnline()
	})

	// A message that the server does not want can be copied and discarded.
	alice.script(`return import([...document.querySelectorAll("link[rel=modulepreload]")].find(l => l.href.endsWith("/page.js")).href)
		.then(page => { page.client.limit *= 2; })`)
	long := strings.Repeat("字", maxMessage/3+1)
	alice.click("#text")
	alice.paste(long)
	alice.press("#text", enterKey)
	failed := append(slices.Clone(said), "alice: "+long+" (failed)")
	alice.expect(failed...)
	alice.reload()
	alice.waitOnline()
	alice.expect(failed...)
	if got := alice.text(".refused [role=alert]"); !strings.Contains(got, "8192") {
		t.Errorf("it was refused with %q", got)
	}
	alice.click(`//div[@class="refused"]/button[.="Copy"]`)
	alice.find(`//div[@class="refused"]/button[.="Copied"]`)
	alice.press("#text", pasteKeys)
	if got := alice.value("#text"); got != long {
		t.Errorf("copied were %d bytes of %d", len(got), len(long))
	}
	alice.press("#text", selectAll+backspace)
	alice.click(`//div[@class="refused"]/button[.="Discard"]`)
	alice.expect(said...)
	alice.reload()
	alice.waitOnline()
	alice.expectNow(said...)

	// One that it does not want for now can be sent again, from any tab.
	everywhere(func(int) {
		alice.setNetwork(false)
		alice.wait(`document.body.dataset.state === "offline"`)
	})
	alice.say("late")
	d.post(phone, "/chat/lab/about/", url.Values{"action": {"archive"}})
	everywhere(func(int) { alice.setNetwork(true) })
	failed = append(slices.Clone(said), "alice: late (failed)")
	everywhere(func(int) { alice.expect(failed...) })
	if got := alice.text(".refused [role=alert]"); !strings.Contains(got, "archived") {
		t.Errorf("it was refused with %q", got)
	}
	d.post(phone, "/chat/lab/about/", url.Values{"action": {"restore"}})
	alice.find("#composer") // in a page that the change has loaded
	alice.waitOnline()
	alice.click(`//div[@class="refused"]/button[.="Retry"]`)
	said = append(said, "alice: late")
	everywhere(func(int) { alice.expect(said...) })
}
