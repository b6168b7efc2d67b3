"""The model card of a bundle: what it says, and whose it is."""

from dataclasses import replace

from engine.bundle import Bundle
from exporter.card import CARD, MARK, card
from exporter.export import add_parts, export
from exporter.heads import SharpStack
from tests import tiny


def test_an_export_writes_a_card_of_all_attributes(tmp_path):
    made = export(tiny.parts(), tiny.heads(), out=tmp_path / "faces.lace")
    text = (made.path / CARD).read_text()
    assert text.startswith("---\n")
    assert 'Sampler("faces.lace")' in text
    assert all(f"| {name} |" in text for name in made.attributes)
    assert "The heads are not calibrated" in text


def test_a_card_says_how_well_heads_are_calibrated():
    manifest = Bundle("engine/demo.lace").manifest
    head = manifest.heads[1]
    sharp = replace(head.sharp, ece={head.name: {"0.5": 0.5, "0.7": 0.0123}}) if head.sharp else None
    heads = tuple(replace(h, sharp=sharp) if h is head else h for h in manifest.heads)
    text = card(replace(manifest, heads=heads), "x.lace")
    assert "| 0.012 |" in text
    assert "draws from the posterior" in text


def test_the_card_of_an_owner_is_kept_when_parts_are_added(tmp_path):
    made = export(tiny.parts(), tiny.heads()[1:2], out=tmp_path / "a.lace")
    stack = tiny.heads()[0]
    stack = replace(stack, sharp=SharpStack(stack.layers, True))
    again = add_parts(made.path, [stack], out=tmp_path / "b.lace")
    assert "smile" in (again.path / CARD).read_text()
    assert 'Sampler("b.lace")' in (again.path / CARD).read_text()
    (made.path / CARD).write_text("# Mine\n")
    assert MARK not in (add_parts(made.path, [stack], out=tmp_path / "c.lace").path / CARD).read_text()
