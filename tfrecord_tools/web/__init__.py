"""tfrecord_tools/web"""
