void nothing_yet() {}
