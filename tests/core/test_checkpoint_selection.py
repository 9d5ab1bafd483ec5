from afterglow.core.checkpoint_selection import Candidate, select_checkpoint


def test_the_rule_of_selection():
    def named(*rows):
        return [Candidate(f"c{i}", *row) for i, row in enumerate(rows)]

    # The best is long; c1 is within one standard error and shortest, c2 beats c1 within 1.15 of its length.
    chosen, reasons = select_checkpoint(
        named((0.80, 0.05, 9000, 0.0), (0.76, 0.05, 5000, 0.01), (0.77, 0.05, 5600, 0.0), (0.70, 0.05, 1000, 0.0))
    )
    assert chosen == "c2"
    assert reasons == {
        "c0": "1.80 times as long as the shortest candidate", "c1": "a candidate, but not the best",
        "c3": "more than one standard error below c0",
    }  # fmt: skip
    assert select_checkpoint(named((0.8, 0.05, 5000, 0.0), (0.8, 0.05, 4900, 0.0)))[0] == "c1", "ties to the shorter"
    chosen, reasons = select_checkpoint(named((0.9, 0.05, 100, 0.06), (0.2, 0.05, 100, 0.05)))
    assert chosen == "c1" and reasons == {"c0": "6.0% of its samples are truncated"}
    assert select_checkpoint(named((0.9, 0.05, 100, 0.5)))[0] is None
    assert select_checkpoint(named((0.8, 0.05, 50, 0.0), (0.8, 0.05, 50, 0.0)))[0] == "c0", "then to the earlier"
