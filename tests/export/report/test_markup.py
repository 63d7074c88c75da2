from skink.export.report.markup import document, join, tag


def test_text_and_attributes_are_escaped():
    made = tag("p", "<b>&", class_='"><script>')
    assert made == '<p class="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;</p>'


def test_markup_is_not_escaped_again_and_none_is_left_out():
    assert tag("p", tag("b", "x"), None, [tag("i"), "<"], id=None) == "<p><b>x</b><i></i>&lt;</p>"
    assert join(["a", None], tag("br")) == "a<br />"


def test_names_and_numbers_of_attributes():
    assert tag("rect", x=1.0, y=2.346, text_anchor="end") == '<rect x="1" y="2.35" text-anchor="end"></rect>'


def test_control_characters_do_not_reach_the_page():
    assert tag("p", "a\x00b", title="\x1b") == '<p title="\ufffd">a\ufffdb</p>'


def test_document_forbids_itself_to_load_anything():
    page = document(title="<t>", style="p > b { }", body=tag("p"))
    assert page.startswith("<!DOCTYPE html>\n<html")
    assert "default-src &#x27;none&#x27;" in page
    assert "<title>&lt;t&gt;</title>" in page
