"""tfrecord_tools/account"""
