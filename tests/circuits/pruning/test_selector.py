"""How candidate circuits are tried."""

from hf_circuit_sparsity.circuits.pruning.selector import _PATIENCE, Selector


class Counting(Selector):
    """Whose items cost what they are, and of which those can go that may."""

    def __init__(self, may_go):
        self.target, self._few, self.may_go, self.tried = 1e9, None, may_go, []

    def losses(self, candidates, few=False):
        return [max(gone) for gone, _ in candidates]

    def reaches(self, keep, cut=()):
        self.tried.append(keep)
        return set(keep) <= self.may_go


def dropped(selector, items):
    return selector.drop_needless(items, lambda gone: (sorted(gone), ()), "nodes", progress=False)


def test_of_few_items_every_one_is_tried():
    selector = Counting({3, 40})
    assert sorted(dropped(selector, range(50))) == [3, 40]
    assert {(i,) for i in range(50)} - {(3,), (40,)} <= {
        tuple(set(keep) - {3, 40}) for keep in selector.tried
    }


def test_where_many_of_the_cheapest_cannot_go_the_others_are_not_tried():
    selector = Counting(set())
    assert dropped(selector, range(1000)) == []
    alone = [keep for keep in selector.tried if len(keep) == 1]
    assert alone == [[i] for i in range(_PATIENCE)]
    assert len(selector.tried) < _PATIENCE + 20
    selector = Counting({_PATIENCE // 2, 900})
    assert dropped(selector, range(1000)) == [_PATIENCE // 2]
