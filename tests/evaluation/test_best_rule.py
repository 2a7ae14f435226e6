from moe.evaluation.evaluate import best_rule


def test_rows_are_judged_by_their_hits_and_tokens_by_their_loss():
    assert best_rule("classify") == best_rule("match")
    assert best_rule("match") == ("accuracy", "max")
    for task in ("language", "seq2seq", "ctc"):
        assert best_rule(task).mode == "min"
