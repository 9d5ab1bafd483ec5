from afterglow.eval.report_steps import describe_report


def test_facts_tables_and_no_histograms():
    report = {
        "scored": 12345,
        "mean_branch_ratio": 0.123456,
        "highest_kept_score": None,
        "complete": True,
        "length": {"spearman": -0.5, "histogram": {"edges": [0, 1], "counts": {"a": [1]}}},
        "sources": ["a", "b"],
        "by_source": {"a": {"rows": 2, "share": {"propose": 0.5}}, "b": {"rows": 1000, "interval": [0.25, 0.75]}},
        "teachers": [{"name": "x"}, {"name": "y"}],
        "histogram": {"edges": [0, 1], "counts": {}},
        "problems": {},
    }
    facts, tables = describe_report(report)
    assert facts == [
        ("scored", "12,345"),
        ("mean branch ratio", "0.1235"),
        ("highest kept score", "–"),
        ("complete", "yes"),
        ("length: spearman", "-0.5"),
        ("sources", "a, b"),
    ]
    by_source, teachers = tables
    assert by_source == (
        "by source",
        ["rows", "share: propose", "interval"],
        [("a", ["2", "0.5", "–"]), ("b", ["1,000", "–", "0.25 to 0.75"])],
    )
    assert teachers.rows == [("1", ["x"]), ("2", ["y"])]


def test_a_long_table_says_what_it_leaves_out():
    _, (table,) = describe_report({"items": {f"{i:03}": {"n": i} for i in range(50)}})
    assert table.title == "items (the first 40 of 50)" and len(table.rows) == 40
    assert describe_report({}) == ([], [])
