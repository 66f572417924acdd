void nothing_either() {}
