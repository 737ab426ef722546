from trainer import run_folder


def test_trains(train_tiny):
    folder = train_tiny()
    status = run_folder.status(folder)
    assert status.state == "finished"
