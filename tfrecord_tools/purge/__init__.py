"""tfrecord_tools/purge"""
