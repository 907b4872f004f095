import threading

from avex_serve.inference.engine import FairSemaphore
from tests.clients import until


def test_whoever_came_first_is_next():
    """Also before the one that releases, should it want to go on."""
    places, order = FairSemaphore(1), []

    def work(name):
        with places:
            order.append(name)

    places.acquire()
    threads = []
    for name in range(5):
        threads.append(threading.Thread(target=work, args=(name,)))
        threads[-1].start()
        until(lambda count=name + 1: len(places._waiting) == count)
    places.release()
    work("last")
    for thread in threads:
        thread.join(20)
    assert order == [0, 1, 2, 3, 4, "last"]


def test_no_more_are_inside_than_there_are_places():
    places, inside, most = FairSemaphore(3), set(), []

    def work(name):
        for _ in range(50):
            with places:
                inside.add(name)
                most.append(len(inside))
                inside.discard(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 8 * 50
    assert max(most) <= 3
    with places, places, places:  # all have come back
        pass
